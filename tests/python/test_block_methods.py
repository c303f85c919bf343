"""The methods that score blocks of keys: masks against each method's words, said a second time in PyTorch."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashprefill as fp
from oracle import TILE, tensors

FREE = {"sink_blocks": 0, "window_blocks": 0}  # nothing but the diagonal is forced


def until(mass, share, first, margin):
    """Keep `first`, then blocks by falling mass until they hold the share; and what is near a tie."""
    keep, near = first.copy(), np.zeros(len(mass), bool)
    order = sorted(np.flatnonzero(~first), key=lambda b: (-mass[b], b))
    held, goal = mass[first].sum(), share * mass.sum()
    last = None
    for b in order:
        edge = abs(held - goal) <= margin * mass.sum() or (
            last is not None and held >= goal and mass[b] >= mass[last] * (1 - margin)
        )
        if edge:
            near |= np.abs(mass - mass[b]) <= margin * mass[b]
        if held >= goal and not edge:
            break
        if held < goal:
            keep[b], last = True, b
        held += mass[b]
    return keep, near & ~first


def within(mass, share, margin):
    """The top blocks whose sum is at most the share, at least one."""
    keep, near = np.zeros(len(mass), bool), np.zeros(len(mass), bool)
    order = sorted(range(len(mass)), key=lambda b: (-mass[b], b))
    held = 0.0
    for rank, b in enumerate(order):
        held += mass[b]
        keep[b] = rank == 0 or held <= share * mass.sum()
        if rank and (
            abs(held - share * mass.sum()) <= margin * mass.sum()
            or (keep[b] != keep[order[rank - 1]] and mass[b] >= mass[order[rank - 1]] * (1 - margin))
        ):
            near |= np.abs(mass - mass[b]) <= margin * mass[b]
            near[order[rank - 1]] = True
    return keep, near


def top(mass, count, margin):
    """The top `count` blocks."""
    order = sorted(range(len(mass)), key=lambda b: (-mass[b], b))
    keep = np.isin(np.arange(len(mass)), order[:count])
    near = np.zeros(len(mass), bool)
    if 0 < count < len(order):
        near = np.abs(mass - mass[order[count]]) <= margin * mass[order[count]]
    return keep, near


def padded(x, stride):
    """Rows [n, dim] as cells [ceil(n / stride), stride, dim], zeros behind the end."""
    rest = -len(x) % stride
    return torch.cat([x, x.new_zeros(rest, x.shape[1])]).reshape(-1, stride, x.shape[1])


def block_mass(z, sees, cells_per_block, blocks):
    """Softmax of scores [rows, cells] over what rows see, summed by block."""
    shares = z.masked_fill(~sees, -math.inf).softmax(1).sum(0)
    shares = torch.cat([shares, shares.new_zeros(blocks * cells_per_block)])[: blocks * cells_per_block]
    return shares.reshape(blocks, cells_per_block).sum(1).numpy()


def rounded_mean(x, dtype, dim=0):
    return x.mean(dim).to(dtype).double()


class Definition:
    """A policy's mask of one sequence [tokens, heads, dim]: `keep`, and `near` a tie."""

    def __init__(self, q, k, policy):
        self.dtype, self.policy = q.dtype, policy
        self.margin = 1e-3 if q.dtype == torch.float32 else 1e-2
        self.scale = q.shape[-1] ** -0.5
        (self.q_len, heads, self.dim), (self.k_len, kv_heads, _) = q.shape, k.shape
        self.prefix, self.size = self.k_len - self.q_len, policy.block_size
        self.blocks = -(-self.k_len // self.size)
        tiles = -(-self.q_len // TILE)
        self.keep = np.zeros((heads, tiles, self.blocks), bool)
        self.near = np.zeros_like(self.keep)
        for h in range(heads):
            keys = k[:, h // (heads // kv_heads)].double()
            choose = getattr(self, policy.kind)(q[:, h].double(), keys, h)
            for m in range(tiles):
                begin, end = m * TILE, min((m + 1) * TILE, self.q_len)
                diagonal, visible = (
                    (self.prefix + begin) // self.size,
                    (self.prefix + end - 1) // self.size + 1,
                )
                forced = np.zeros(visible, bool)
                forced[: policy.sink_blocks] = True
                forced[max(0, diagonal - max(0, policy.window_blocks - 1)) :] = True
                keep, near = choose(begin, end, visible, forced)
                self.keep[h, m, :visible] = keep | forced
                self.near[h, m, :visible] = near & ~forced

    def xattention(self, q, keys, h):
        p, stride = self.policy, self.policy.stride
        cells = padded(keys, stride).flatten(1)
        share = p.threshold if p.head_thresholds is None else p.head_thresholds[h]

        def choose(begin, end, visible, forced):
            rows = padded(q[begin:end], stride).flip(1).flatten(1)
            last = torch.arange(begin, end, stride).add(stride).clamp(max=end) - 1
            z = rows @ cells.T * self.scale / (stride * p.norm)
            sees = torch.arange(len(cells)) <= ((self.prefix + last) // stride)[:, None]
            return until(block_mass(z, sees, self.size // stride, visible), share, forced, self.margin)

        return choose

    def rrattention(self, q, keys, h):
        p, stride = self.policy, self.policy.stride
        cells = torch.stack([rounded_mean(cell, self.dtype) for cell in keys.split(stride)])

        def choose(begin, end, visible, forced):
            at = (torch.arange(begin, end, stride) + (stride - 1 - h) % stride).clamp(max=end - 1)
            sees = torch.arange(len(cells)) <= ((self.prefix + at) // stride)[:, None]
            mass = block_mass(q[at] @ cells.T * self.scale, sees, self.size // stride, visible)
            return until(mass, p.threshold, np.zeros(visible, bool), self.margin)

        return choose

    def spargeattn(self, q, keys, h):
        p = self.policy
        least = p.similarity if p.similarity is not None else 0.6 if p.topk is None else -0.1
        means = torch.stack([rounded_mean(block, self.dtype) for block in keys.split(self.size)])

        def alike(x):
            unit = torch.nn.functional.normalize(x, dim=1)
            return float((unit @ unit.T).mean())

        likeness = np.array([alike(block) for block in (keys - keys.mean(0)).split(self.size)])

        def choose(begin, end, visible, forced):
            tile = alike(q[begin:end])
            similar = likeness[:visible] > least
            if not tile > least:
                similar[:] = False
            doubt = min(abs(tile - least), np.abs(likeness[:visible] - least).min()) < 1e-4
            z = rounded_mean(q[begin:end], self.dtype) @ means[:visible].T * self.scale
            keep, near = ~similar, np.full(visible, doubt)
            if similar.any():
                mass = z[torch.from_numpy(similar)].softmax(0).numpy()
                rule = (
                    top(mass, int(p.topk * self.blocks), self.margin)
                    if p.cdf is None
                    else within(mass, p.cdf, self.margin)
                )
                keep[similar], near[similar] = rule[0], rule[1] | doubt
            return keep, near

        return choose

    def prism(self, q, keys, h):
        p, d = self.policy, self.dim
        means = torch.stack([rounded_mean(block, self.dtype) for block in keys.split(self.size)])
        rotary = p.rotary_dim or d
        half = rotary // 2
        index = torch.arange(d)
        pair = index // 2 if p.interleaved else index % half
        high = (index < rotary) & (pair < (p.high_pairs or -(-half // 2)))
        low = (index >= rotary) | (pair >= half - (p.low_pairs or -(-3 * half // 4)))

        def rms(x):
            return float(x.square().mean().sqrt())

        def choose(begin, end, visible, forced):
            mean, seen = rounded_mean(q[begin:end], self.dtype), means[:visible]
            keep, sure, near = (np.zeros(visible, bool) for _ in range(3))
            for band in (high, low):
                wide = int(band.sum())
                tau = math.sqrt(wide / d) * rms(mean[band]) / rms(mean) * rms(seen[:, band]) / rms(seen)
                z = seen[:, band] @ mean[band] * self.scale * math.sqrt(d / wide) / tau
                kept, open_ = until(z.softmax(0).numpy(), p.mass, np.zeros(visible, bool), self.margin)
                keep, sure, near = keep | kept, sure | (kept & ~open_), near | open_
            return keep, near & ~sure

        return choose

    def sampleattention(self, q, keys, h):
        p = self.policy
        segments = min(max(1, math.floor(self.q_len * p.sample_ratio / p.sample_rows + 0.5)), self.q_len)
        columns, distances = np.zeros(self.blocks), np.zeros(self.blocks)
        for segment in range(segments):
            begin, end = segment * self.q_len // segments, (segment + 1) * self.q_len // segments
            for i in range(max(begin, end - p.sample_rows), end):
                own = (self.prefix + i) // self.size
                shares = (keys[: self.prefix + i + 1] @ q[i] * self.scale).softmax(0)
                mass = [float(block.sum()) for block in shares.split(self.size)]
                columns[: own + 1] += mass
                distances[: own + 1] += mass[::-1]
        nothing = np.zeros(self.blocks, bool)
        column, column_near = until(columns, p.coverage, nothing, self.margin)
        distance, distance_near = until(distances, p.coverage, nothing, self.margin)
        window = math.ceil(p.window_ratio * self.k_len)

        def choose(begin, end, visible, forced):
            keep, near = column[:visible].copy(), column_near[:visible].copy()
            first = self.prefix + begin
            for own in range(first // self.size, visible):
                keep[: own + 1] |= distance[: own + 1][::-1]
                near[: own + 1] |= distance_near[: own + 1][::-1]
            near &= np.arange(visible) < max(0, first - window + 1) // self.size
            keep[max(0, first - window + 1) // self.size :] = True
            return keep, near

        return choose


POLICIES = [
    fp.XAttention(threshold=0.7, norm=0.05, block_size=32),
    fp.XAttention(threshold=0.5, stride=4, norm=0.1, block_size=16, **FREE),
    fp.XAttention(threshold=0.9, stride=8, norm=0.05, block_size=48, sink_blocks=2, window_blocks=2),
    fp.XAttention(head_thresholds=[0, 0.3, 0.6, 1], norm=0.05, block_size=32),
    fp.RRAttention(threshold=0.6, block_size=32, **FREE),
    fp.RRAttention(threshold=0.9, stride=4, block_size=48),
    fp.SpargeAttn(cdf=0.6, similarity=-0.1, block_size=16),
    fp.SpargeAttn(cdf=0.4, similarity=0.06, block_size=16),
    fp.SpargeAttn(topk=0.3, block_size=32),
    fp.Prism(mass=0.4, block_size=16, **FREE),
    fp.Prism(mass=0.5, block_size=32, interleaved=True, rotary_dim=16, high_pairs=3, low_pairs=2),
    fp.SampleAttention(coverage=0.5, sample_ratio=0.1, window_ratio=0.05, sample_rows=8, block_size=32),
    fp.SampleAttention(coverage=0.3, sample_ratio=0.3, window_ratio=0, sample_rows=40, block_size=48, **FREE),
]
SHAPES = [(300, 300), (129, 131), (1, 200), (257, 300), (140, 613)]


@functools.cache  # each backend is held against the same one
def by_definition(policy, q_len, k_len, dtype, heads=(4, 2)):
    q, k, _ = tensors(q_len, (q_len, heads[0], 32), (k_len, heads[1], 32), dtype)
    k = k + torch.linspace(-1, 1, 32)  # keys have a mean, and blocks differ in how far they are from it
    k = k * (1 + torch.arange(k_len) // 40 % 3)[:, None, None]
    q, k = (3 * q).to(dtype), k.to(dtype)
    return q, k, Definition(q, k, policy)


def agree(policy, q, k, expected, engine):
    differs = fp.select(q, k, policy, **engine).dense().numpy() != expected.keep
    assert not (differs & ~expected.near).any()
    assert expected.near.mean() < 0.2


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.text)
@pytest.mark.parametrize("q_len,k_len", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_selection_follows_the_definition(engine, policy, q_len, k_len, dtype):
    agree(policy, *by_definition(policy, q_len, k_len, dtype), engine)


@given(
    kind=st.sampled_from(["xattention", "rrattention", "spargeattn", "prism", "sampleattention"]),
    lengths=st.tuples(st.integers(1, 400), st.sampled_from([0, 1, 17, 64, 200])),
    block_size=st.sampled_from([16, 32, 80]),
    forced=st.tuples(st.integers(0, 2), st.integers(0, 3)),
    heads=st.sampled_from([(1, 1), (3, 1), (10, 2)]),
    share=st.sampled_from([0.2, 0.5, 0.8]),
    stride=st.sampled_from([4, 8, 16]),
)
@settings(max_examples=40)
def test_any_shape(engine, kind, lengths, block_size, forced, heads, share, stride):
    fields = {"block_size": block_size, "sink_blocks": forced[0], "window_blocks": forced[1]}
    policy = {
        "xattention": lambda: fp.XAttention(threshold=share, stride=stride, norm=0.1, **fields),
        "rrattention": lambda: fp.RRAttention(threshold=share, stride=stride, **fields),
        "spargeattn": lambda: fp.SpargeAttn(cdf=share, similarity=0.05, **fields),
        "prism": lambda: fp.Prism(mass=share, **fields),
        "sampleattention": lambda: fp.SampleAttention(coverage=share, window_ratio=0.1, **fields),
    }[kind]()
    q, k, expected = by_definition(policy, lengths[0], sum(lengths), torch.float32, heads)
    differs = fp.select(q, k, policy, **engine).dense().numpy() != expected.keep
    assert not (differs & ~expected.near).any()


ROW_LOCAL = [
    fp.XAttention(threshold=0.7, norm=0.1, block_size=64),
    fp.RRAttention(threshold=0.7, block_size=64),
    fp.Prism(mass=0.6, block_size=64),
]


@pytest.mark.parametrize("policy", ROW_LOCAL, ids=lambda p: p.kind)
def test_chunks_select_as_the_whole(engine, policy):
    """Where the prefix is whole tiles, a chunk's tiles are those of the whole prompt."""
    q, k, _ = by_definition(policy, 640, 640, torch.float32)
    whole = fp.select(q, k, policy, **engine).dense()
    for begin, end in ((0, 256), (256, 640), (384, 512)):
        chunk = fp.select(q[begin:end], k[:end], policy, **engine).dense()
        rows = whole[:, begin // TILE : end // TILE, : chunk.shape[2]]
        assert torch.equal(chunk, rows)


@pytest.mark.parametrize("policy", ROW_LOCAL, ids=lambda p: p.kind)
def test_the_future_does_not_select(engine, policy):
    q, k, _ = by_definition(policy, 640, 640, torch.float32)
    changed, asked = k.clone(), q.clone()
    changed[384:], asked[384:] = 7, -3
    before = fp.select(q, k, policy, **engine).dense()[:, :3]
    assert torch.equal(before, fp.select(asked, changed, policy, **engine).dense()[:, :3])


@pytest.mark.parametrize(
    "policy",
    [
        fp.XAttention(threshold=1),
        fp.RRAttention(threshold=1),
        fp.SpargeAttn(topk=1),
        fp.SpargeAttn(cdf=1, similarity=-1),
        fp.Prism(mass=1),
        fp.SampleAttention(coverage=1),
    ],
    ids=lambda p: p.text,
)
def test_all_of_the_mass_is_all_blocks(engine, policy):
    q, k, v = tensors(3, (700, 2, 64), (900, 2, 64))
    assert fp.select(q, k, policy, **engine).density == 1
    dense = fp.prefill_attention(q, k, v, fp.Dense(policy.block_size), **engine)
    assert torch.equal(fp.prefill_attention(q, k, v, policy, **engine), dense)


@pytest.mark.parametrize(
    "policy",
    [fp.XAttention(threshold=0), fp.RRAttention(threshold=1e-6), fp.SpargeAttn(cdf=0, similarity=-0.1)],
)
def test_least_is_the_forced_blocks_and_what_the_rule_always_takes(engine, policy):
    q, k, _ = tensors(3, (700, 2, 64), (900, 2, 64))
    kept = fp.select(q, k, policy, **engine).dense()
    forced = fp.Streaming(policy.sink_blocks, policy.window_blocks, 0, policy.block_size)
    more = kept.sum(2) - fp.select(q, k, forced, **engine).dense().sum(2)
    assert (more == 0).all() if policy.kind == "xattention" else ((more == 0) | (more == 1)).all()


def test_a_table_of_thresholds_is_read_into_a_policy_for_each_layer(tmp_path):
    table = [[0.9, 0.0], [0.5, 1]]
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    layers = fp.XAttention.from_config(path, stride=8)
    assert layers == {
        0: fp.XAttention(head_thresholds=(0.9, 0.0), stride=8),
        1: fp.XAttention(head_thresholds=(0.5, 1.0), stride=8),
        "default": fp.XAttention(stride=8),
    }
    assert fp.XAttention.from_config(table, stride=8) == layers
    q, k, _ = tensors(0, (700, 2, 16), (700, 1, 16))
    mask = fp.select(q, k, layers[0]).dense()
    alone = [fp.select(q, k, fp.XAttention(threshold=each, stride=8)).dense() for each in (0.9, 0.0)]
    assert torch.equal(mask[0], alone[0][0]) and torch.equal(mask[1], alone[1][1])
    with pytest.raises(ValueError, match=r"config is of 1 to 2 heads a layer; it must be of as many"):
        fp.XAttention.from_config([[0.9], [0.9, 0.9]])
    with pytest.raises(ValueError, match=r"head_thresholds\[1\] is 1.5"):
        fp.XAttention.from_config([[0.9, 1.5]])
    with pytest.raises(TypeError, match="config is .*; it must be a list of thresholds for each layer"):
        fp.XAttention.from_config({"0": [0.9]})
