"""TokenSparse: which tokens are dropped, by hand and by the authors' rule; attention over the rest."""

import math
import pickle

import numpy as np
import pytest
import torch

import flashprefill as fp
from flashprefill._tokens import kept_tokens, scores


def published(q, k, coverage, window, pool, min_tokens, per_kv_head=False):
    """The authors' rule in PyTorch, in float64: the tokens of each head, or None where all are kept."""
    n, heads, dim = q.shape
    group = heads // k.shape[1]
    keys = k.double().repeat_interleave(group, dim=1)
    z = torch.einsum("qhd,khd->hqk", q[n - window :].double(), keys) / math.sqrt(dim)
    position = torch.arange(n - window, n)
    z.masked_fill_(torch.arange(n)[None, None] > position[None, :, None], -math.inf)
    p = z.softmax(-1).mean(1)[:, : n - window]
    p = torch.nn.functional.avg_pool1d(p[:, None], pool, stride=1, padding=pool // 2)[:, 0]
    g = p.mean(0) / p.mean(0).sum()
    drop = int((g.sort().values.cumsum(0) < coverage).sum())
    if drop == 0:
        return None
    count = max(min_tokens, n - window - drop - 1)
    if per_kv_head:
        p = p.view(-1, group, n - window).mean(1)
    return [sorted([*row.topk(count).indices.tolist(), *range(n - window, n)]) for row in p]


def dense_over(q, k, v, tokens):
    """Causal attention in float64 over each head's tokens, zeros elsewhere, and the lse."""
    n, heads, dim = q.shape
    group = heads // k.shape[1]
    out, lse = torch.zeros(n, heads, dim, dtype=torch.float64), torch.full((heads, n), -math.inf)
    for h in range(heads):
        kept = torch.tensor(tokens[h * len(tokens) // heads])
        z = q[kept, h].double() @ k[kept, h // group].double().T / math.sqrt(dim)
        z.masked_fill_(torch.ones_like(z, dtype=torch.bool).triu(1), -math.inf)
        out[kept, h] = z.softmax(-1) @ v[kept, h // group].double()
        lse[h, kept] = z.logsumexp(-1).float()
    return out, lse


def tensors(n, heads=4, kv_heads=2, dim=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (n, heads, dim), (n, kv_heads, dim), (n, kv_heads, dim)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_scores_by_hand():
    # Six keys of one dimension whose weights are 1, 2, 4, 8, 1, 1; the window is the last two rows, with
    # queries of 1. Row 4 sees five keys, 16 in all, row 5 six, 17. So token 0 has the mean of 1/16 and 1/17.
    k = np.log(np.array([1, 2, 4, 8, 1, 1], np.float32)).reshape(6, 1, 1)
    q = np.ones((6, 1, 1), np.float32)
    share = (1 / 16 + 1 / 17) / 2
    assert scores(q, k, 1.0, 2, 1)[0] == pytest.approx([share, 2 * share, 4 * share, 8 * share], rel=1e-5)
    # Averages of three neighbours, with zeros before the first and after the last: 3, 7, 14 and 12 thirds.
    assert scores(q, k, 1.0, 2, 3)[0] == pytest.approx(
        [share, 7 / 3 * share, 14 / 3 * share, 4 * share], rel=1e-5
    )


def test_kept_tokens_by_hand():
    # Two heads of one KV head over eight tokens, a window of 2. Their mean is .01 .02 .03 .24 .1 .2 .1 .3:
    # in ascending order the sums are .01 .03 .06 .16 .26 .46 .7 1.
    mean = np.array([0.01, 0.02, 0.03, 0.24, 0.1, 0.2, 0.1, 0.3])
    tilt = np.array([0.01, 0.02, 0.03, -0.2, -0.1, 0, 0.1, 0.14])
    scored = np.stack([mean + tilt, mean - tilt])
    window = [8, 9]

    def kept(coverage, **fields):
        policy = fp.TokenSparse(coverage=coverage, window=2, min_tokens=2, **fields)
        tokens = kept_tokens(scored, policy, 2)
        return None if tokens is None else tokens.tolist()

    assert kept(0.01) is None and kept(0.0) is None  # no sum is below: nothing is dropped
    # .05: two sums are below it, and the token that crosses goes too: five stay. Equal scores go by the lower
    # token: the first head has .02 .04 .06 .04 0 .2 .2 .44, the second 0 0 0 .44 .2 .2 0 .16.
    assert kept(0.05) == [[1, 2, 5, 6, 7, *window], [0, 3, 4, 5, 7, *window]]
    assert kept(0.05, per_kv_head=True) == [[3, 4, 5, 6, 7, *window]]
    assert kept(0.9) == [[5, 7, *window], [3, 4, *window]]  # no fewer than min_tokens
    policy = fp.TokenSparse(coverage=0.9, window=2, min_tokens=6)
    assert kept_tokens(scored, policy, 2).shape == (2, 8)


@pytest.mark.parametrize("per_kv_head", [False, True])
@pytest.mark.parametrize("kind", ["numpy", "torch", "bfloat16"])
def test_attention_over_what_the_authors_keep(engine, per_kv_head, kind):
    q, k, v = tensors(700)
    q = 2 * q
    if kind == "bfloat16":
        q, k, v = (x.bfloat16() for x in (q, k, v))
    fields = {"coverage": 0.2, "window": 64, "pool": 5, "min_tokens": 100}
    tokens = published(q.float(), k.float(), *fields.values(), per_kv_head)
    assert tokens is not None and len(tokens[0]) < 600
    policy = fp.TokenSparse(**fields, per_kv_head=per_kv_head)
    given = [x.numpy() for x in (q, k, v)] if kind == "numpy" else [q, k, v]
    out, lse, stats = fp.prefill_attention(*given, policy, return_lse=True, return_stats=True, **engine)
    expected, expected_lse = dense_over(q, k, v, tokens)
    tolerance = 2e-2 if kind == "bfloat16" else 2e-5
    out, lse = torch.as_tensor(out), torch.as_tensor(lse)
    assert (out.double() - expected).abs().max() < tolerance
    dropped = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, dropped) and int(dropped.sum()) == 4 * (700 - len(tokens[0]))
    assert (lse - expected_lse)[~dropped].abs().max() < tolerance
    assert (out[dropped.T] == 0).all()
    # 128 rows and keys per block: the kept rows are a prompt of their own, of which all is visible.
    tiles = -(-len(tokens[0]) // 128)
    assert np.asarray(stats.kept).tolist() == [[tiles * (tiles + 1) // 2] * 4]
    assert stats.reasons == ["selected"] and 0.1 < stats.mean_density < 1


def test_any_policy_inside(engine):
    q, k, v = tensors(900, seed=3)
    fields = {"coverage": 0.2, "window": 32, "min_tokens": 200}
    tokens = published(2 * q, k, 0.2, 32, 7, 200)
    for inner in ("streaming(sink_blocks=1, window_blocks=2)", "sketch(block_size=64)", "gather(gain=0.1)"):
        policy = fp.TokenSparse(inner, **fields)
        out = fp.prefill_attention(2 * q, k, v, policy, **engine)
        each = torch.tensor(tokens).T
        of_kv = torch.arange(4) // 2
        gathered = (2 * q)[each, torch.arange(4)], k[each, of_kv], v[each, of_kv]
        expected = fp.prefill_attention(*gathered, inner, **engine)
        assert torch.equal(out[each, torch.arange(4)], expected)


def test_what_goes_to_the_inner_policy_whole(engine):
    q, k, v = tensors(600)
    policy = fp.TokenSparse("streaming(dense_tail_blocks=0)", coverage=0.2, window=64, min_tokens=100)
    inner = policy.policy

    def same(*given, **options):
        out, lse, stats = fp.prefill_attention(
            *given, policy, return_lse=True, return_stats=True, **options, **engine
        )
        want, want_lse = fp.prefill_attention(*given, inner, return_lse=True, **options, **engine)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
        return stats.reasons

    assert same(q[200:], k, v) == ["prefix or chunk"]
    assert same(q, k, v, final_chunk=False) == ["prefix or chunk"]
    assert same(q[:164], k[:164], v[:164]) == ["short"]
    nothing = fp.TokenSparse(coverage=0.0, window=64, min_tokens=100)
    out, stats = fp.prefill_attention(q, k, v, nothing, return_stats=True, **engine)
    assert torch.equal(out, fp.prefill_attention(q, k, v, "dense", **engine))
    assert stats.reasons == ["selected"] and stats.mean_density == 1


def test_batches_and_pages(engine):
    """Each sequence is what it is alone: packed, in a rectangle, and with its keys on pages."""
    policy = fp.TokenSparse(coverage=0.2, window=64, min_tokens=100)
    lengths = [500, 0, 150, 420]
    parts = [tensors(n, seed=n) for n in lengths]
    alone = [fp.prefill_attention(*part, policy, return_lse=True, **engine) for part in parts if len(part[0])]
    q, k, v = (torch.cat([part[i] for part in parts]) for i in range(3))
    cu = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    out, lse, stats = fp.prefill_attention(
        q, k, v, policy, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True, return_stats=True, **engine
    )
    assert torch.equal(out, torch.cat([one[0] for one in alone]))
    assert torch.equal(lse, torch.cat([one[1] for one in alone], dim=1))
    assert stats.reasons[0] == stats.reasons[3] == "selected" and stats.reasons[2] == "short"
    two = [tensors(500, seed=500), tensors(500, seed=7)]
    batch = [torch.stack([part[i] for part in two]) for i in range(3)]
    both = fp.prefill_attention(*batch, policy, **engine)
    assert torch.equal(both[0], alone[0][0])
    pages = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:32].view(1, 32).int()
    k_pages, v_pages = torch.zeros(40, 16, 2, 32), torch.zeros(40, 16, 2, 32)
    for t in range(500):
        page = int(pages[0, t // 16])
        k_pages[page, t % 16], v_pages[page, t % 16] = two[0][1][t], two[0][2][t]
    used = torch.tensor([500], dtype=torch.int32)
    places = {
        "seqused_k": used,
        "block_table": pages,
        "cu_seqlens_q": torch.tensor([0, 500], dtype=torch.int32),
    }
    assert torch.equal(
        fp.prefill_attention(two[0][0], k_pages, v_pages, policy, **places, **engine), alone[0][0]
    )


def test_text_and_fields():
    policy = fp.TokenSparse(fp.Sketch(gain=0.01), coverage=0.01, window=64, layers=[3, 4])
    assert policy.text == "tokensparse(inner=sketch(gain=0.01), coverage=0.01, window=64, layers=[3, 4])"
    from flashprefill.policies.text import parse

    assert parse(policy.text) == policy and pickle.loads(pickle.dumps(policy)) == policy
    assert parse("TokenSparse") == fp.TokenSparse()
    table = "minference(heads=[[0, 10, 20]])"
    assert parse(f"tokensparse(inner={table})").policy == parse(table)
    for text, words in {
        "tokensparse(inner=tokensparse)": "dropped once",
        "tokensparse(inner=nothing)": "must be one of",
        "tokensparse(coverage=1)": "coverage is 1",
        "tokensparse(pool=4)": "pool is 4; it must be odd",
        "tokensparse(window=0)": "window is 0",
        "tokensparse(gain=1)": "gain is unknown",
        "tokensparse(layers=3)": "layers",
    }.items():
        with pytest.raises((fp.InvalidArgumentError, fp.ArgumentTypeError), match=words):
            parse(text)
    q, k, v = tensors(200)
    with pytest.raises(fp.UnsupportedError, match="tokensparse drops tokens and has no mask"):
        fp.select(q, k, "tokensparse")
    with pytest.raises(fp.UnsupportedError, match="causal"):
        fp.prefill_attention(q, k, v, "tokensparse", causal=False)


def test_layers():
    model = fp.TokenSparse("streaming")._in_model(6)
    assert [model.at_layer(n).kind for n in range(6)] == ["streaming"] * 3 + ["tokensparse"] * 3
    llama = fp.TokenSparse.for_model("meta-llama/Llama-3.1-8B-Instruct", inner="sketch")
    assert llama.coverage == 0.005 and llama.layers == tuple(range(15, 31)) and "Token Sparse" in llama.source
    assert llama.at_layer(14).kind == "sketch" and llama.at_layer(30).kind == "tokensparse"
    assert fp.TokenSparse(layers=()).at_layer(0).kind == "dense"


def test_in_a_model():
    """Half of a model's layers drop tokens; a chunk and decoding see all."""
    from transformers_models import make, tokens

    model = make("llama", num_hidden_layers=4)
    ids = tokens(length=400)
    with torch.no_grad():
        exact = model(ids).logits
        fp.patch_model(model, "tokensparse(coverage=0.0, window=32, min_tokens=64)")
        assert (model(ids).logits - exact).abs().max() < 1e-3  # nothing is dropped
        fp.patch_model(model, "tokensparse(coverage=0.3, window=32, min_tokens=64)")
        with fp.collect_stats(model) as stats:
            dropped = model(ids).logits
    assert [call.reason for call in stats.calls] == [""] * 4
    assert np.isnan(stats.density).sum() == 0
    assert (stats.density[:2] == 1).all() and (stats.density[2:] < 0.8).all()
    # The last row's layers see what the scores kept; rows in the middle lose attention whole.
    error = (dropped - exact).abs().amax(dim=-1)[0]
    assert error[-1] < error[:300].max()
