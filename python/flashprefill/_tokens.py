"""TokenSparse: which tokens a prompt's heads keep, and attention over these alone.

The scores are exact: the softmax of the last rows. Kept tokens stay in their order, and their positions are
in q and k already, so attention over them is causal attention over fewer tokens, by any policy. Rows are
gathered for one sequence at a time, as [kept tokens, heads, head_dim], and scattered to where they came from.
On a GPU scores are made there, and the few numbers per token come to the host, which decides.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import numpy as np

from . import _timings
from ._arrays import on_cuda, refuse_overlap
from ._layout import TILE_ROWS, Layout
from ._prototype import _keys_of
from .errors import UnsupportedError
from .policies import TokenSparse
from .stats import Stats

SELECTED, SHORT, PREFIX = 0, 1, 3  # fallbacks of Stats


def scores(q: Any, k: Any, scale: float, window: int, pool: int) -> np.ndarray:
    """Return the mean softmax of the last `window` rows on each token before them, float64 [heads, tokens].

    Averaged over `pool` neighbours, of which those past the ends count as zeros. Products that are not finite
    count for nothing.

    Args:
        q: queries [tokens, heads, head_dim], NumPy or torch, in host memory or a GPU's.
        k: keys [tokens, kv_heads, head_dim].
        scale: factor of the scores.
        window: rows.
        pool: tokens, odd.
    """
    if on_cuda(q):
        return _scores_on_device(q, k, scale, window, pool)
    tokens, heads = q.shape[:2]
    group, before = heads // k.shape[1], tokens - window
    result = np.zeros((heads, before))
    future = np.triu(np.ones((window, window), np.bool_), 1)
    ones = np.ones(pool) / pool
    for h in range(heads):
        z = scale * _product(q[before:, h], k[:, h // group])
        z[~np.isfinite(z)] = -np.inf
        z[:, before:][future] = -np.inf
        top = z.max(axis=1, keepdims=True)
        z = np.exp(z - np.where(np.isfinite(top), top, 0))
        total = z.sum(axis=1, dtype=np.float64)
        weights = np.divide(1, total, out=np.zeros(window), where=total > 0) / window
        result[h] = np.convolve(weights @ z[:, :before], ones)[pool // 2 : pool // 2 + before]
    return result


def _scores_on_device(q: Any, k: Any, scale: float, window: int, pool: int) -> np.ndarray:
    """Return the same of tensors in a GPU's memory, the query heads of a KV head at a time."""
    torch = sys.modules["torch"]
    tokens, heads = q.shape[:2]
    group, before = heads // k.shape[1], tokens - window
    future = torch.ones(window, window, dtype=torch.bool, device=q.device).triu(1)
    means = []
    for kv in range(k.shape[1]):
        rows = q[before:, kv * group : (kv + 1) * group].detach().float().transpose(0, 1)
        z = scale * rows @ k[:, kv].detach().float().T
        z.masked_fill_(~z.isfinite(), -math.inf)
        z[..., before:].masked_fill_(future, -math.inf)
        top = z.amax(-1, keepdim=True)
        z = (z - top.masked_fill(~top.isfinite(), 0)).exp_()
        total = z.sum(-1, keepdim=True, dtype=torch.float64)
        weights = torch.where(total > 0, 1 / total, 0).float() / window
        means.append((z[..., :before] * weights).sum(1, dtype=torch.float64))
    mean = torch.cat(means)
    pooled = torch.nn.functional.avg_pool1d(mean[:, None], pool, stride=1, padding=pool // 2)[:, 0]
    return np.asarray(pooled.cpu().numpy())


def kept_tokens(scored: np.ndarray, policy: TokenSparse, group: int) -> np.ndarray | None:
    """Return the tokens that each head keeps, ascending, int64 [heads or KV heads, tokens]; None: all.

    Args:
        scored: what `scores` returned.
        policy: how many.
        group: query heads per KV head.
    """
    heads, before = scored.shape
    mass = scored.mean(axis=0)
    total = mass.sum()
    if total <= 0:
        return None
    dropped = int((np.cumsum(np.sort(mass / total)) < policy.coverage).sum())
    if dropped == 0:
        return None
    count = min(max(policy.min_tokens, before - dropped - 1), before)  # the one that crosses goes too
    if policy.per_kv_head:
        scored = scored.reshape(heads // group, group, before).mean(axis=1)
    best = np.sort(np.argsort(-scored, axis=1, kind="stable")[:, :count], axis=1)
    window = np.arange(before, before + policy.window)
    return np.concatenate([best, np.broadcast_to(window, (len(best), policy.window))], axis=1)


def prefill(
    ops: Any,
    tensors: tuple[Any, Any, Any],
    results: tuple[Any, Any],
    policy: TokenSparse,
    layout: Layout,
    final_chunk: list[bool],
    shared: dict[str, Any],
) -> Stats:
    """Write attention of q over the kept tokens into out, and into lse where it is wanted.

    Args:
        ops: the array library.
        tensors: q, k and v.
        results: out and lse, or None for the latter.
        policy: the wrapper.
        layout: where the sequences lie in the tensors.
        final_chunk: whether each sequence's rows end its prompt, or one bool for all.
        shared: the keyword arguments of the call as `_arguments.shared_of` returns them.
    """
    q, k, v = tensors
    out, lse = results
    if not layout.causal:
        raise UnsupportedError(f"{policy.kind} takes causal attention only")
    heads = q.shape[-2]
    counts = np.zeros((heads, layout.total_q // TILE_ROWS + layout.batch), np.int32)
    fallback = np.zeros(layout.batch, np.int32)
    refuse_overlap(out, q=q, k=k, v=v)
    options = {name: shared[name] for name in ("softmax_scale", "backend", "target")}
    options["threads"] = None if shared["threads"] < 0 else shared["threads"]
    starts = None if layout.cu_seqlens_k is None else ops.to_host(layout.cu_seqlens_k)
    for seq, (begin, rows, keys) in enumerate(layout.sequences(ops)):
        if rows <= 0:
            continue
        start = 0 if starts is None else int(starts[seq])
        rectangular = len(q.shape) == 4
        own_q, own_out = (x[seq] if rectangular else x[begin : begin + rows] for x in (q, out))
        own_k, own_v = (_keys_of(x, layout, seq, keys, start) for x in (k, v))
        own_lse = None if lse is None else lse[seq] if rectangular else lse[:, begin : begin + rows]
        ends = final_chunk[seq % len(final_chunk)] if final_chunk else True
        fallback[seq] = _why_whole(rows, keys, ends, policy)
        kept = _attend(ops, (own_q, own_k, own_v), (own_out, own_lse), policy, ends, fallback[seq], options)
        counts[:, begin // TILE_ROWS + seq] = kept
    return Stats(
        layout.kept(ops), ops.from_host(counts), ops.from_host(fallback), TILE_ROWS, policy.block_size
    )


def _why_whole(rows: int, keys: int, ends: bool, policy: TokenSparse) -> int:
    if rows != keys or not ends:
        return PREFIX
    return SHORT if rows <= policy.min_tokens + policy.window else SELECTED


def _attend(
    ops: Any,
    tensors: tuple[Any, Any, Any],
    results: tuple[Any, Any],
    policy: TokenSparse,
    ends: bool,
    fallback: int,
    options: dict[str, Any],
) -> np.ndarray:
    """Attend for one sequence. Returns the blocks that each head kept, in tiles of 128 rows."""
    from .api import prefill_attention

    q, k, v = tensors
    out, lse = results
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    begin_time = time.perf_counter()
    tokens = None

    def index(x: np.ndarray) -> Any:
        there = ops.from_host(x)
        return there.to(q.device) if on_cuda(q) else there

    if fallback == SELECTED:
        scored = scores(q, k, options["softmax_scale"], policy.window, policy.pool)
        tokens = kept_tokens(scored, policy, group)
    where = None
    if tokens is not None:
        each = np.repeat(tokens, heads // len(tokens), axis=0).T
        where = index(np.ascontiguousarray(each)), index(np.arange(heads))
        kv = each if len(tokens) == heads else np.ascontiguousarray(tokens.T)
        of_kv = np.arange(heads) // group if len(tokens) == heads else np.arange(len(tokens))
        from_kv = index(np.ascontiguousarray(kv)), index(of_kv)
        q, k, v = q[where], k[from_kv], v[from_kv]
    timings = _timings.active()
    if timings is not None:
        timings.select_seconds += time.perf_counter() - begin_time
    extra: dict[str, Any] = {"final_chunk": ends, "layout": "bthd", "return_lse": True, "return_stats": True}
    result, result_lse, stats = prefill_attention(q, k, v, policy.policy, **extra, **options)
    if where is None:
        out[...] = result
        if lse is not None:
            lse[...] = result_lse
    else:
        out[...] = 0
        out[where] = result
        if lse is not None:
            lse[...] = -np.inf
            lse[where[1], where[0]] = result_lse.T
    kept = np.asarray(ops.to_host(stats.kept))[0] * (stats._tile_tokens / TILE_ROWS)
    return np.repeat(np.rint(kept), heads // len(kept)).astype(np.int32)


def _product(q: Any, k: Any) -> np.ndarray:
    """Return q k^T in fp32, by the tensors' own library and its threads."""
    if isinstance(q, np.ndarray):
        return np.asarray(np.matmul(q.astype(np.float32), k.astype(np.float32).T))
    return np.asarray((q.detach().float() @ k.detach().float().T).numpy())
