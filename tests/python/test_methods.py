"""FlexPrefill, MInference, A-shape and Tri-shape: masks against each method's words, and their own names."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashprefill as fp
from flashprefill.flex_prefill import flex_prefill_attention, patch_model
from oracle import tensors

# ------------------------------------------------------------------------------------------- FlexPrefill


def js_distance(a, b):
    m = (a + b) / 2
    return math.sqrt(max(0.0, float(sum(torch.special.xlogy(x, x / m).sum() / 2 for x in (a, b)))))


def top(values, count):
    values = values.clone()
    values[0] = math.inf  # the first is kept always
    return set(torch.sort(values, descending=True, stable=True).indices[:count].tolist())


def published_flex_prefill(q, k, gamma, tau, min_budget, max_budget, size):
    """The paper's algorithm with its code's rounding, for one head of one sequence from its first token on.

    q, k: [tokens, head_dim]. Returns bool [blocks, blocks] and whether the head was query-aware.
    """
    n, blocks = q.shape[0], -(-q.shape[0] // size)
    rows = min(size, n)
    least = max(1, -(-min_budget // size))
    most = blocks if max_budget is None else min(blocks, -(-max_budget // size))
    scale, position = q.shape[1] ** -0.5, torch.arange(n)
    last = q[-rows:].double() @ k.double().T * scale
    last = last.masked_fill(position[None, :] > position[-rows:, None], -math.inf).softmax(-1)
    vertical = last.mean(0)
    distance = position[-rows:, None] - position[None, :]
    slash = torch.zeros(n, dtype=torch.float64).index_add(
        0, distance[distance >= 0], last[distance >= 0] / rows
    )
    by_column = torch.zeros(blocks, dtype=torch.float64).index_add(0, position // size, vertical)
    by_distance = torch.zeros(blocks, dtype=torch.float64).index_add(
        0, blocks - 1 - (n - 1 - position) // size, slash
    )

    def budget(mass):
        tokens = int((mass.sort(descending=True).values.cumsum(0) <= gamma).sum()) + 1
        return min(max(tokens // 128 + 1, least), most)

    def means(x):
        return torch.stack([part.double().mean(0).to(x.dtype) for part in x.split(size)]).double()

    mean_keys = means(k)
    foretold = (q[-rows:].double().mean(0).to(q.dtype).double() @ mean_keys.T * scale).softmax(-1)
    query_aware = js_distance(foretold, by_column) < tau
    columns, distances = budget(vertical), budget(slash)
    if query_aware:
        columns = distances = least
    columns, distances = top(by_column, columns), top(by_distance, distances)
    row, column = torch.meshgrid(torch.arange(blocks), torch.arange(blocks), indexing="ij")
    keep = torch.zeros(blocks, blocks, dtype=torch.bool)
    for c in columns:
        keep |= column == c
    for s in distances:
        keep |= row - column == s
    if query_aware:
        scores = (means(q) @ mean_keys.T * scale).masked_fill(column > row, -math.inf).softmax(-1)
        order = scores.flatten().sort(descending=True, stable=True)
        kept = order.indices[order.values.cumsum(0) <= gamma * blocks]
        keep.view(-1)[kept] = True
    return keep & (column <= row), query_aware


def peaked(seed, tokens, heads, kv_heads, dim, dtype=torch.float32):
    """q, k, v where some keys stand out and near ones matter more."""
    q, k, v = tensors(seed, (tokens, heads, dim), (tokens, kv_heads, dim), dtype)
    k[torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[: tokens // 40]] *= 4
    return q, k, v


SETTINGS = [
    # gamma, tau, min_budget, max_budget. Rows of a map sum to 1: gamma times their number must be no integer.
    (0.91, 0.1, 1, None),
    (0.51, 0.0, 200, None),
    (0.62, 1.0, 1, None),
    (0.97, 0.0, 1, 384),
    (0.83, 0.3, 256, 512),
]


@pytest.mark.parametrize("gamma,tau,least,most", SETTINGS)
@pytest.mark.parametrize("tokens", [640, 700, 1025])
def test_flex_prefill_is_the_published_one(tokens, gamma, tau, least, most):
    q, k, _ = peaked(tokens, tokens, 3, 3, 32)
    policy = fp.FlexPrefill(gamma=gamma, tau=tau, min_budget=least, max_budget=most)
    mask = fp.select(q, k, policy, backend="reference").dense()
    for h in range(3):
        want, _ = published_flex_prefill(q[:, h], k[:, h], gamma, tau, least, most, 128)
        assert torch.equal(mask[h], want), f"head {h}"


def test_both_patterns_occur_in_these_cases():
    kinds = set()
    for gamma, tau, least, most in SETTINGS:
        q, k, _ = peaked(640, 640, 3, 3, 32)
        for h in range(3):
            kinds.add(published_flex_prefill(q[:, h], k[:, h], gamma, tau, least, most, 128)[1])
    assert kinds == {False, True}


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(257, 900),
    gamma=st.floats(0.05, 0.99),
    tau=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    least=st.integers(0, 300),
    seed=st.integers(0, 2**20),
)
def test_flex_prefill_at_any_length(tokens, gamma, tau, least, seed):
    gamma = float(np.float32(gamma))  # as the library reads it
    q, k, _ = peaked(seed, tokens, 2, 1, 16)
    policy = fp.FlexPrefill(gamma=gamma, tau=tau, min_budget=least)
    mask = fp.select(q, k, policy, backend="reference")
    fast = fp.select(q, k, policy).dense()
    for h in range(2):
        want, _ = published_flex_prefill(q[:, h], k[:, 0], gamma, tau, least, None, 128)
        if mask.stats.reasons == ["short"]:
            want = torch.ones_like(want).tril()
        assert torch.equal(mask.dense()[h], want)
    # Near ties aside, which tests/cpp tells apart exactly, every backend keeps the same.
    assert (fast != mask.dense()).float().mean() < 0.02


@pytest.mark.parametrize("size", [32, 64, 256])
def test_smaller_and_larger_blocks(size):
    """A tile of 128 rows keeps what the blocks of queries inside it keep, or the one that it lies in."""
    q, k, _ = peaked(size, 1100, 1, 1, 32)
    mask = fp.select(
        q, k, fp.FlexPrefill(gamma=0.62, tau=1.0, min_budget=64, block_size=size), backend="reference"
    )
    want, query_aware = published_flex_prefill(q[:, 0], k[:, 0], 0.62, 1.0, 64, None, size)
    assert query_aware
    blocks, tiles = want.shape[0], -(-1100 // 128)
    for m in range(tiles):
        rows = range(m * 128 // size, min((min(m * 128 + 128, 1100) - 1) // size, blocks - 1) + 1)
        visible = (min(m * 128 + 128, 1100) - 1) // size + 1
        union = torch.stack([want[r] for r in rows]).any(0) & (torch.arange(blocks) < visible)
        union[m * 128 // size : visible] = True  # the tile's diagonal
        assert torch.equal(mask.dense()[0, m], union), f"tile {m}"


def test_the_example_of_its_readme():
    """Its own first example; here with fewer tokens, on the CPU."""
    batch, tokens, heads, dim = 1, 1500, 8, 64
    gamma, tau = 0.9, 0.1
    q = torch.randn(batch, tokens, heads, dim, dtype=torch.bfloat16)
    k = torch.randn(batch, tokens, heads // 4, dim, dtype=torch.bfloat16)
    v = torch.randn(batch, tokens, heads // 4, dim, dtype=torch.bfloat16)
    out = flex_prefill_attention(q, k, v, gamma, tau, min_budget=512, max_budget=None)
    assert out.shape == q.shape and out.dtype == q.dtype
    policy = fp.FlexPrefill(gamma=gamma, tau=tau, min_budget=512)
    assert torch.equal(out, fp.prefill_attention(q, k, v, policy))


def test_the_ratio_and_every_argument():
    q, k, v = (torch.randn(2, 900, h, 32) for h in (4, 2, 2))
    out, ratio = flex_prefill_attention(
        q, k, v, 0.5, tau=0.0, min_budget=64, max_budget=512, softmax_scale=0.3, block_size=64,
        return_computational_ratio=True,
    )  # fmt: skip
    policy = fp.FlexPrefill(gamma=0.5, tau=0.0, min_budget=64, max_budget=512, block_size=64)
    want, stats = fp.prefill_attention(q, k, v, policy, softmax_scale=0.3, return_stats=True)
    assert torch.equal(out, want) and ratio == stats.mean_density and 0 < ratio < 1
    nothing_given = flex_prefill_attention(q, k, v, 0.5)
    assert torch.equal(
        nothing_given, fp.prefill_attention(q, k, v, fp.FlexPrefill(gamma=0.5, tau=0.0, min_budget=1))
    )


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_interleaved_heads(library):
    q, k, v = (torch.randn(1, 700, h, 16) for h in (6, 2, 2))
    if library == "numpy":
        q, k, v = (x.numpy() for x in (q, k, v))
    out = flex_prefill_attention(q, k, v, 0.6, 0.1, gqa_interleave=True)
    for h in range(6):
        kv = slice(h % 2, h % 2 + 1)
        one = flex_prefill_attention(q[:, :, h : h + 1], k[:, :, kv], v[:, :, kv], 0.6, 0.1)
        assert np.array_equal(np.asarray(out[:, :, h : h + 1]), np.asarray(one)), f"head {h}"


def test_gamma_1_is_dense_attention():
    q, k, v = tensors(3, (700, 4, 32), (700, 2, 32))
    dense = fp.prefill_attention(q, k, v, fp.Dense())
    for tau in (0.0, 10.0):
        mask = fp.select(q, k, fp.FlexPrefill(gamma=1.0, tau=tau, min_budget=1))
        assert mask.density == 1 and mask.stats.reasons == ["dense"]
        assert torch.allclose(fp.attend(q, k, v, mask), dense, atol=1e-6)


def test_its_patch_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, 700), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(ids).logits
        flex_prefill_config = {
            "block_size": 128,
            "flex_prefill_gamma": 0.9,
            "flex_prefill_tau": 0.1,
            "flex_prefill_min_budget": 512,
            "flex_prefill_max_budget": None,
        }
        patch_model(model, "flex_prefill", flex_prefill_config)
        policy = fp.FlexPrefill(gamma=0.9, tau=0.1, min_budget=512)
        assert [layer.self_attn._flashprefill.policy for layer in model.model.layers] == [policy] * 2
        assert model(ids).logits.shape == dense.shape
        fp.patch_model(model, "flex_prefill", {**flex_prefill_config, "flex_prefill_gamma": 1.0})
        assert torch.allclose(model(ids).logits, dense, atol=1e-3)
        output = model.generate(ids, max_new_tokens=2, do_sample=False)
        assert output.shape == (1, 702)
        fp.patch_model(model, "tri-shape", {"n_init": 64, "n_local": 100, "n_last": 1})
        assert model.model.layers[0].self_attn._flashprefill.policy == fp.Streaming(1, 2, 1)


def test_presets():
    assert fp.FlexPrefill.for_model("Llama-3.1") == fp.FlexPrefill(gamma=0.95, tau=0.1, min_budget=1024)
    assert fp.FlexPrefill.for_model("qwen2", tau=0).gamma == 0.9
    assert fp.MInference.for_model("llama-3.1-8b").slash == 2048
    for policy in (fp.FlexPrefill, fp.MInference):
        with pytest.raises(ValueError, match=r"model is 'gpt-2'; it must be of a family .*llama-3\.1"):
            policy.for_model("gpt-2")


# -------------------------------------------------------------------------------------------- MInference


def published_vertical_slash(q, k, vertical, slash):
    """Columns and distances that the paper's method keeps of one head [tokens, head_dim]."""
    n, rows = q.shape[0], min(64, q.shape[0])
    position = torch.arange(n)
    last = q[-rows:].double() @ k.double().T * q.shape[1] ** -0.5
    last = last.masked_fill(position[None, :] > position[-rows:, None], -math.inf).softmax(-1)
    distance = position[-rows:, None] - position[None, :]
    columns = last.sum(0)
    diagonals = torch.zeros(n, dtype=torch.float64).index_add(0, distance[distance >= 0], last[distance >= 0])
    columns[:30] = math.inf
    diagonals[:100] = math.inf

    def best(x, count):
        return x.sort(descending=True, stable=True).indices[:count]

    return best(columns, max(vertical, 30)), best(diagonals, max(slash, 50))


@pytest.mark.parametrize("size", [64, 128, 16])
@pytest.mark.parametrize("vertical,slash", [(30, 50), (40, 130), (200, 0)])
def test_minference_is_the_published_one_in_blocks(vertical, slash, size):
    n = 900
    q, k, _ = peaked(size, n, 2, 1, 32)
    policy = fp.MInference(vertical=vertical, slash=slash, block_size=size)
    mask = fp.select(q, k, policy, backend="reference").dense()
    for h in range(2):
        columns, distances = published_vertical_slash(q[:, h], k[:, 0], vertical, slash)
        # Every (row, key) of the lines, rounded out to (tile, block); and the tile's own diagonal.
        tokens = torch.zeros(n, n, dtype=torch.bool)
        tokens[:, columns] = True
        for d in distances.tolist():
            tokens |= torch.diag(torch.ones(n - d), -d) > 0
        tiles, blocks = -(-n // 128), -(-n // size)
        want = torch.zeros(tiles, blocks, dtype=torch.bool)
        for m in range(tiles):
            begin, end = m * 128, min(m * 128 + 128, n)
            keys = tokens[begin:end].any(0)
            seen = (end - 1) // size + 1
            padded = torch.nn.functional.pad(keys, (0, blocks * size - n)).view(blocks, size)
            want[m] = padded.any(1) & (torch.arange(blocks) < seen)
            want[m, begin // size : seen] = True
        assert torch.equal(mask[h], want), f"head {h}"
    fast = fp.select(q, k, policy).dense()
    assert (fast != mask).float().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_lines_of_tokens(library, dtype):
    """Exactly the published tokens, besides the tile's own blocks: masks, attention, density."""
    n, vertical, slash = 700, 40, 130
    q, k, v = peaked(1, n, 2, 1, 32, dtype)
    if library == "numpy" and dtype is torch.bfloat16:
        pytest.skip("NumPy has no bf16")
    policy = fp.MInference(vertical=vertical, slash=slash, rounding="tokens")
    arrays = [x.numpy() for x in (q, k, v)] if library == "numpy" else (q, k, v)
    equal = torch.equal if library == "torch" else np.array_equal
    mask = fp.select(arrays[0], arrays[1], policy)
    out, lse = fp.attend(*arrays, mask, return_lse=True)
    both, stats = fp.prefill_attention(*arrays, policy, return_stats=True)
    assert equal(fp.prefill_attention(*arrays, policy), both)
    assert equal(both, out)
    kept = 0
    for h in range(2):
        columns, distances = published_vertical_slash(q[:, h], k[:, 0], vertical, slash)
        lines = mask.vertical_slash[0, h].tolist()
        assert lines[2 : 2 + vertical] == sorted(columns.tolist())
        assert lines[2 + mask.max_verticals :][:slash] == sorted(distances.tolist())
        for m in range(-(-n // 128)):
            begin, end = m * 128, min(m * 128 + 128, n)
            keys = torch.zeros(n + 128, dtype=torch.bool)
            keys[columns] = True
            for d in distances.tolist():
                keys[max(0, begin - d) : max(0, end - d)] = True
            keys[begin:] = False
            blocks = (end - 1) // 64 + 1 - begin // 64
            kept += blocks + -(-int(keys.sum()) // 64)
            keys[begin:end] = True
            seen = keys[None, :n] & (torch.arange(n)[None, :] <= torch.arange(begin, end)[:, None])
            z = (q[begin:end, h].double() @ k[:, 0].double().T * 32**-0.5).masked_fill(~seen, -math.inf)
            close = 1e-4 if dtype is torch.float32 else 2e-2
            want = z.softmax(-1) @ v[:, 0].double()
            assert torch.allclose(torch.as_tensor(out[begin:end, h]).double(), want, atol=close)
            assert torch.allclose(torch.as_tensor(lse[h, begin:end]).double(), z.logsumexp(-1), atol=close)
    assert int(mask.stats.kept.sum()) == int(stats.kept.sum()) == kept
    rounded = fp.select(q, k, fp.MInference(vertical=vertical, slash=slash)).dense()
    assert np.array_equal(np.asarray(mask.dense()), np.asarray(rounded))


def test_lines_go_from_torch_to_numpy_and_are_checked():
    q, k, v = peaked(2, 600, 2, 1, 16)
    mask = fp.select(q, k, fp.MInference(vertical=30, slash=60, rounding="tokens"))
    arrays = [x.numpy() for x in (q, k, v)]
    assert np.allclose(fp.attend(*arrays, mask), fp.attend(q, k, v, mask).numpy())
    mask.vertical_slash[0, 1, 3] = mask.vertical_slash[0, 1, 2]
    with pytest.raises(
        ValueError,
        match=r"mask\.vertical_slash\[0\]\[1\]'s vertical 1 is 0; it must be at least 0, and above",
    ):
        fp.attend(q, k, v, mask)
    mask.vertical_slash[0, 1, 0] = 31
    with pytest.raises(
        ValueError, match=r"mask\.vertical_slash\[0\]\[1\]\[0\] is 31; it must be from 0 to 30"
    ):
        fp.attend(q, k, v, mask)


TABLE = [
    {
        "0": ["vertical_and_slash", 40, 200, 0.9],
        "1": ["stream_llm", 100, 150, 0.8],
        "2": ["block_sparse", 2, 0, 1],
    },
    {"1": ["vertical_and_slash", 500, 700, 1]},
]


def test_tables_of_heads_are_read_as_they_are(tmp_path):
    path = tmp_path / "a_model.json"
    path.write_text(json.dumps(TABLE))
    layers = fp.MInference.from_config(path, block_size=128)
    default = ("vertical_and_slash", 1000, 6096)
    assert layers == {
        0: fp.MInference(
            heads=(("vertical_and_slash", 40, 200), ("stream_llm", 100, 150), ("block_sparse", 2, 0)),
            block_size=128,
        ),
        1: fp.MInference(heads=(default, ("vertical_and_slash", 500, 700), default), block_size=128),
        "default": fp.MInference(block_size=128),
    }
    half = fp.MInference.from_config(TABLE, q_heads=4, ratio=0.5)
    assert half[0].heads[:2] == (("vertical_and_slash", 20, 100), ("stream_llm", 100, 150))
    assert half[0].heads[3] == ("vertical_and_slash", 500, 3048)
    with pytest.raises(ValueError, match=r"config\[0\]'s head is 2; it must be from 0 to 1"):
        fp.MInference.from_config(TABLE, q_heads=2)
    with pytest.raises(ValueError, match=r"config\[0\]\[0\]'s pattern is 'zigzag'"):
        fp.MInference.from_config([{"0": ["zigzag", 1, 2, 3]}])
    with pytest.raises(TypeError, match="config is .*; it must be a list with one object per layer"):
        fp.MInference.from_config({"0": 1})


def test_each_head_has_its_own_pattern():
    q, k, v = peaked(5, 900, 3, 3, 32)
    policy = fp.MInference.from_config(TABLE)[0]
    mask = fp.select(q, k, policy).dense()
    for h, (pattern, a, b) in enumerate(policy.heads):
        alone = fp.MInference(heads=[(pattern, a, b)])
        one = fp.select(q[:, h : h + 1], k[:, h : h + 1], alone).dense()
        assert torch.equal(mask[h], one[0]), pattern
    with pytest.raises(ValueError, match=r"head_count is 3; it must be the problem's q_heads \(2\)"):
        fp.select(q[:, :2], k[:, :2], policy)
    assert fp.prefill_attention(q, k, v, policy).shape == q.shape


# ------------------------------------------------------------------------------- A-shape and Tri-shape


@settings(max_examples=40, deadline=None)
@given(
    prefix=st.integers(0, 300),
    tokens=st.integers(1, 700),
    first=st.integers(0, 200),
    nearest=st.integers(1, 400),
    last=st.integers(0, 200),
    size=st.sampled_from([16, 64, 128]),
)
def test_shapes_of_tokens_hold_all_that_they_name(prefix, tokens, first, nearest, last, size):
    policy = fp.Streaming.tri_shape(first, nearest, last, block_size=size)
    q, k = np.zeros((tokens, 1, 8), np.float32), np.zeros((prefix + tokens, 1, 8), np.float32)
    mask = fp.select(q, k, policy).dense()[0]
    without_tail = fp.select(q, k, fp.Streaming.a_shape(first, nearest, block_size=size)).dense()[0]
    assert not (without_tail & ~mask).any()
    row, key = np.arange(tokens)[:, None] + prefix, np.arange(prefix + tokens)[None, :]
    named = (key <= row) & ((key < first) | (row - key < nearest) | (row >= prefix + tokens - last))
    for m in range(mask.shape[0]):
        inside = np.flatnonzero(named[m * 128 : m * 128 + 128].any(0)) // size
        assert mask[m, inside].all()


def test_shapes_have_the_published_defaults():
    assert fp.Streaming.a_shape() == fp.Streaming(1, 32, 0)
    assert fp.Streaming.tri_shape() == fp.Streaming(1, 32, 2)
    assert fp.Streaming.a_shape(0, 1) == fp.Streaming(0, 1, 0)
