"""What is right, said a second time: PyTorch's SDPA in float64, and the selection rules.

Written to be short, not fast, and with none of the package's code, so the reference is checked too.
"""

import functools
import math

import numpy as np
import torch

# Largest error against float64 that an input of unit variance may show, absolute below 1 and relative above.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
TILE = 128


def tensors(seed, q_shape, k_shape, dtype=torch.float32):
    """Random q, k and v of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype) for s in (q_shape, k_shape, k_shape)]


def error(actual, expected):
    """The largest error, absolute below 1 and relative above."""
    actual, expected = actual.double(), expected.double()
    if expected.numel() == 0:
        return 0.0
    return float(((actual - expected).abs() / expected.abs().clamp(min=1)).max())


def visible(q_len, k_len, causal=True):
    """Bool [rows, keys]: whether a row may see a key."""
    if not causal:
        return torch.ones(q_len, k_len, dtype=torch.bool)
    return torch.arange(k_len)[None] <= torch.arange(q_len)[:, None] + (k_len - q_len)


def token_mask(keep, q_heads, q_len, k_len, block_size, tile_tokens, causal=True):
    """Bool [q_heads, rows, keys] of a mask [mask heads, tiles, blocks]."""
    keep = torch.as_tensor(np.asarray(keep))
    keep = keep.repeat_interleave(q_heads // keep.shape[0], dim=0)
    rows = keep.repeat_interleave(tile_tokens, dim=1)[:, :q_len]
    return rows.repeat_interleave(block_size, dim=2)[:, :, :k_len] & visible(q_len, k_len, causal)


def attention(q, k, v, allowed, scale=None):
    """Attention in float64 of [tokens, heads, dim] under bools [heads, rows, keys]: out, lse."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sees = allowed.any(-1)
    # SDPA is undefined for rows that see nothing; ours gives zeros.
    filled = allowed | ~sees[..., None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=filled, scale=scale)
    out = torch.where(sees[..., None], out, 0.0)
    scores = torch.where(allowed, q @ k.transpose(1, 2) * scale, -math.inf)
    return out.transpose(0, 1), torch.logsumexp(scores, -1)


def summed_up(keys, values, counts, query, scale):
    """One key, value and weight for blocks of these means and counts, to first order around a query."""
    weights = counts * (scale * keys.double() @ query).exp()
    key, value = (((weights / weights.sum()) @ x.double()).to(x.dtype).double()[None] for x in (keys, values))
    return key, value, weights.sum() / (scale * key @ query).exp()


def corrected_attention(q, k, v, keep, block_size, tile_tokens, scale=None, summary=None):
    """The mean correction by definition: blocks left out, visible to the whole tile count by their means.

    summary: those of so many neighbouring blocks by one key.
    """
    (q_len, heads, dim), (k_len, kv_heads, _) = q.shape, k.shape
    scale = dim**-0.5 if scale is None else scale
    out, lse = (
        torch.zeros(q_len, heads, dim, dtype=torch.float64),
        torch.zeros(heads, q_len, dtype=torch.float64),
    )
    kept = token_mask(keep, heads, q_len, k_len, block_size, tile_tokens)
    keep = torch.as_tensor(np.asarray(keep)).repeat_interleave(heads // keep.shape[0], dim=0)
    for h in range(heads):
        kd, vd = k[:, h // (heads // kv_heads)], v[:, h // (heads // kv_heads)]
        for begin in range(0, q_len, tile_tokens):
            tile = begin // tile_tokens
            rows = slice(begin, min(begin + tile_tokens, q_len))
            full = (k_len - q_len + begin) // block_size
            blocks = [b for b in range(full) if not keep[h, tile, b]]
            cuts = [slice(b * block_size, min((b + 1) * block_size, k_len)) for b in blocks]
            counts = [float(c.stop - c.start) for c in cuts]
            keys, values = (
                torch.cat([x, *(x[c].double().mean(0, keepdim=True).to(x.dtype) for c in cuts)]).double()
                for x in (kd, vd)
            )
            if summary:
                query, means = q[rows, h].double().mean(0), [x[k_len:].to(k.dtype) for x in (keys, values)]
                parts, counts_of = [], torch.tensor(counts, dtype=torch.float64)
                for first in range(0, full, summary):
                    mine = [i for i, b in enumerate(blocks) if first <= b < first + summary]
                    if mine:
                        parts.append(summed_up(*(x[mine] for x in means), counts_of[mine], query, scale))
                keys, values = (
                    torch.cat([x[:k_len], *(part[i] for part in parts)]) for i, x in enumerate((keys, values))
                )
                counts = [float(part[2]) for part in parts]
            weights = torch.tensor([1.0] * k_len + counts, dtype=torch.float64).log()
            z = q[rows, h].double() @ keys.T * scale + weights
            z[:, :k_len].masked_fill_(~kept[h, rows], -math.inf)
            out[rows, h] = z.softmax(-1).nan_to_num() @ values
            lse[h, rows] = torch.logsumexp(z, -1)
    return out, lse


class Selection:
    """The blocks that FlashPrefill or Sketch keep of one sequence [tokens, heads, dim].

    `keep` is what is kept; `near` marks blocks whose energy is too close to the threshold to insist on.
    """

    def __init__(self, q, k, policy, margin=1e-3, final_chunk=True, scale=None):
        self.q, self.k, self.policy, self.margin = q, k, policy, margin
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        (self.q_len, heads, _), (self.k_len, kv_heads, _) = q.shape, k.shape
        self.prefix, self.size = self.k_len - self.q_len, policy.block_size
        group = heads // kv_heads
        self.tile_tokens = TILE // group if policy.share_heads else TILE
        groups = [[h] for h in range(heads)]
        if policy.share_heads:
            groups = [list(range(g * group, (g + 1) * group)) for g in range(kv_heads)]
        self.tiles = -(-self.q_len // self.tile_tokens)
        self.metric = torch.ones(kv_heads, q.shape[-1], dtype=torch.float64)
        if getattr(policy, "query_metric", False):
            ends = [min((m + 1) * self.tile_tokens, self.q_len) - 1 for m in range(self.tiles)]
            rows = q[ends].double().nan_to_num(0, 0, 0).view(len(ends), kv_heads, group, -1)
            self.metric = (rows**2).sum((0, 2))
        self.blocks = -(-self.k_len // self.size)
        self.keep = np.zeros((len(groups), self.tiles, self.blocks), bool)
        self.near = np.zeros_like(self.keep)
        tail = -(-policy.dense_tail_blocks * self.size // self.tile_tokens) if final_chunk else 0
        for index, members in enumerate(groups):
            for m in range(self.tiles):
                begin, end = m * self.tile_tokens, min((m + 1) * self.tile_tokens, self.q_len)
                last = (self.prefix + end - 1) // self.size
                forced = np.zeros(self.blocks, bool)
                forced[: policy.sink_blocks] = True
                first = (self.prefix + begin) // self.size
                forced[max(0, min(first, first - policy.window_blocks + 1)) :] = True
                if m >= self.tiles - tail:
                    forced[:] = True
                chosen, near = self._choose(members, members[0] // group, begin, end)
                seen = np.arange(self.blocks) <= last
                self.keep[index, m] = (chosen | forced) & seen
                self.near[index, m] = near & ~forced & seen

    def _rows(self, h, begin, end):
        """Pooled rows of a head's tile [rows, dim], and the positions at which they stand."""
        starts = range(begin, end, self.policy.query_pool)
        stops = [min(start + self.policy.query_pool, end) for start in starts]
        if self.policy.query_pool == 1:
            rows = self.q[begin:end, h].double()
        else:
            means = [self.q[i:j, h].double().mean(0) for i, j in zip(starts, stops, strict=True)]
            rows = torch.stack(means).to(self.q.dtype).double()
        return rows, self.prefix + torch.tensor(stops) - 1

    def _sees(self, positions, block, end):
        if self.policy.share_heads:
            return (positions >= block * self.size) & ((block + 1) * self.size <= self.prefix + end)
        return positions >= block * self.size + self.size - 1

    @functools.cache  # noqa: B019 (as long as the selection lives)
    def _sketch(self, block, kv_head):
        """The keys that stand for themselves, and count, mean and variance of the others."""
        keys = self.k[block * self.size : (block + 1) * self.size, kv_head].double()
        outliers = getattr(self.policy, "outliers", 0)
        distance = (self.metric[kv_head] * (keys - keys.mean(0)) ** 2).sum(1)
        far = torch.sort(distance, descending=True, stable=True).indices[:outliers]
        rest = keys[[i for i in range(len(keys)) if i not in far.tolist()]]
        mean = rest.mean(0).to(self.k.dtype).double()
        variance = ((rest - rest.mean(0)) ** 2).mean(0).to(self.k.dtype).double()
        return keys[far], len(rest), mean, variance

    def _log_energies(self, rows, block, kv_head):
        far, count, mean, variance = self._sketch(block, kv_head)
        if self.policy.kind == "flashprefill":
            return self.scale * rows @ mean
        terms = [self.scale * rows @ far.T]
        if count:
            second = 0.5 * self.scale**2 * (rows**2 @ variance)
            terms.append((math.log(count) + self.scale * rows @ mean + second)[:, None])
        return torch.logsumexp(torch.cat(terms, 1), 1)

    def _choose(self, heads, kv_head, begin, end):
        logs = {}
        for h in heads:
            rows, positions = self._rows(h, begin, end)
            for block in range(self.blocks):
                sees = self._sees(positions, block, end)
                if sees.any():
                    logs.setdefault(block, []).extend(self._log_energies(rows[sees], block, kv_head).tolist())
        chosen, near = np.zeros(self.blocks, bool), np.zeros(self.blocks, bool)
        if not logs:
            return chosen, near
        reference = max(max(z) for z in logs.values())
        energy = {b: sum(math.exp(z - reference) for z in zs) for b, zs in logs.items()}
        order = sorted(energy, key=lambda b: (-energy[b], b))
        if getattr(self.policy, "mass", None) is not None:
            goal, held = self.policy.mass * sum(energy.values()), 0.0
            for b in order:
                if held < goal:
                    chosen[b] = True
                near[b] = abs(held / goal - 1) < self.margin
                held += energy[b]
        elif getattr(self.policy, "gain", None) is not None:
            total = sum(energy.values())
            rest, going = total, True
            for b in order:
                worth = energy[b] / total * math.sqrt(max(0.0, rest / total))
                going = going and worth >= self.policy.gain
                chosen[b] = going
                near[b] = abs(worth / self.policy.gain - 1) < 2 * self.margin
                rest -= energy[b]
        else:
            bar = self.policy.alpha * energy[order[0]]
            for b in order:
                chosen[b] = energy[b] >= bar
                near[b] = bar > 0 and abs(energy[b] / bar - 1) < self.margin
        top = order[: self.policy.min_blocks]
        chosen[top] = True
        if 0 < len(top) < len(order):
            edge = energy[order[len(top)]] / energy[top[-1]]
            near[[top[-1], order[len(top)]]] |= 1 - edge < self.margin
        return chosen, near
