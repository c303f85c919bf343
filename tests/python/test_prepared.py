"""A prepared prefill gives what `prefill_attention` gives, for layer after layer over paged caches."""

import pytest
import torch

import flashprefill as fp
from flashprefill._prepared import PreparedPrefill, dense_keys, signature
from flashprefill.policies.text import policy_of

H, HKV, D, PAGE = 6, 2, 64, 16
ROWS_AND_KEYS = [(300, 300), (201, 500), (1, 77), (150, 150)]
FINAL = [True, False, True, True]
SMALL = {"sink_blocks": 1, "window_blocks": 1, "dense_tail_blocks": 1, "block_size": 64}
POLICIES = [
    fp.Dense(),
    fp.Streaming(sink_blocks=1, window_blocks=2, dense_tail_blocks=1, block_size=64),
    fp.FlashPrefill(alpha=0.4, **SMALL),
    fp.FlashPrefill(alpha=0.4, share_heads=True, mean_correction=True, **SMALL),
    fp.Sketch(mass=0.7, **SMALL),
    fp.XAttention(threshold=0.6, block_size=64),
    fp.MInference(vertical=30, slash=60),
]
GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(
            not any(b.name == "cuda" and b.available for b in fp.backends()),
            reason="needs the CUDA backend and a GPU that it knows",
        ),
    ],
)
DEVICES = ["cpu", GPU]


def layout(device):
    pages = [-(-keys // PAGE) for _, keys in ROWS_AND_KEYS]
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    for i, part in enumerate(order.split(pages)):
        table[i, : len(part)] = part
    starts = torch.tensor([0] + [rows for rows, _ in ROWS_AND_KEYS]).cumsum(0).to(torch.int32)
    keys = torch.tensor([keys for _, keys in ROWS_AND_KEYS], dtype=torch.int32)
    given = {"cu_seqlens_q": starts, "seqused_k": keys, "block_table": table}
    return {name: value.to(device) for name, value in given.items()}, sum(pages)


def tensors(seed, pages, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(seed)
    rows = sum(rows for rows, _ in ROWS_AND_KEYS)
    qkv = torch.randn(rows, H + 3, D, generator=generator).to(device, dtype)
    cache = torch.randn(pages, HKV, PAGE, 2 * D, generator=generator).to(device, dtype).transpose(1, 2)
    return qkv[:, :H], cache[..., :D], cache[..., D:], torch.full_like(qkv[:, :H], float("nan")).contiguous()


def prepared(layer, policy, given, **changes):
    options = {
        "softmax_scale": 0.11,
        "rows_and_keys": ROWS_AND_KEYS,
        "final_chunk": FINAL,
        **given,
        **changes,
    }
    return PreparedPrefill(*layer, policy, **options)


TOKENS = fp.MInference(vertical=30, slash=60, rounding="tokens")  # lists beside the bits; on the CPU alone


def test_layers_share_keys_finer_than_blocks():
    check_layers(TOKENS, "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_layers_share_it(policy, device):
    check_layers(policy, device)


def check_layers(policy, device):
    given, pages = layout(device)
    layers = [tensors(seed, pages, device) for seed in range(3)]
    assert len({signature(*layer) for layer in layers}) == 1
    ours = prepared(layers[0], policy, given)
    counts = torch.zeros(3, *ours.counts_shape, dtype=torch.int32, device=device)
    for i, (q, k, v, out) in enumerate(layers):
        expected, stats = fp.prefill_attention(
            q, k, v, policy, softmax_scale=0.11, max_seqlen_q=300, max_seqlen_k=500, final_chunk=FINAL,
            return_stats=True, **given,
        )  # fmt: skip
        ours.run(q, k, v, out, counts[i].data_ptr())
        torch.testing.assert_close(out, expected, atol=0, rtol=0)
        assert torch.equal(counts[i].cpu(), stats._counts.cpu())
        assert ours.causal_blocks == int(stats.total.sum()) * stats.kept.shape[1]
        again = torch.empty_like(out)
        ours.run(q, k, v, again)
        assert torch.equal(again, out), "without counts the same"


@pytest.mark.parametrize("device", DEVICES)
def test_queries_that_a_gpu_cannot_read_are_copied(device):
    given, pages = layout(device)
    q, k, v, out = tensors(0, pages, device)
    odd = torch.empty(q.numel() + 1, dtype=q.dtype, device=device)[1:].view(q.shape).copy_(q)
    ours = prepared((odd, k, v, out), fp.Dense(), given)
    ours.run(odd, k, v, out)
    expected = fp.prefill_attention(
        q,
        k,
        v,
        fp.Dense(),
        softmax_scale=0.11,
        max_seqlen_q=300,
        max_seqlen_k=500,
        final_chunk=FINAL,
        **given,
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize(
    "policy", [fp.FlashPrefill(alpha=0.4), fp.Sketch(mass=0.7), fp.XAttention()], ids=repr
)
def test_scratch_memory_may_hold_anything(policy, device):
    """More tiles than a GPU has processors, which take them by a counter in scratch memory."""
    policy = policy_of(policy)
    rows, keys = 4500, 5000  # 216 tiles
    generator = torch.Generator(device).manual_seed(1)
    q = torch.randn(rows, H, D, generator=generator, device=device, dtype=torch.bfloat16)
    cache = torch.randn(keys // PAGE + 1, HKV, PAGE, 2 * D, generator=generator, device=device, dtype=q.dtype)
    k, v = cache.transpose(1, 2).chunk(2, -1)
    given = {
        "cu_seqlens_q": torch.tensor([0, rows], dtype=torch.int32, device=device),
        "seqused_k": torch.tensor([keys], dtype=torch.int32, device=device),
        "block_table": torch.arange(len(cache), dtype=torch.int32, device=device)[None],
    }
    sizes = {"max_seqlen_q": rows, "max_seqlen_k": keys}
    expected = fp.prefill_attention(q, k, v, policy, softmax_scale=0.11, **given, **sizes)
    for byte in (0, 255, 127, 1):
        out = torch.full_like(q, float("nan"))
        ours = PreparedPrefill(
            q,
            k,
            v,
            out,
            policy,
            softmax_scale=0.11,
            rows_and_keys=[(rows, keys)],
            final_chunk=[True],
            **given,
        )
        ours._memory.fill_(byte)
        counts = torch.zeros(ours.counts_shape, dtype=torch.int32, device=device)
        ours.run(q, k, v, out, counts.data_ptr())
        assert torch.equal(out, expected), byte


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_an_output_in_the_memory_of_an_input_is_refused(where):
    given, pages = layout("cpu")
    q, k, v, out = tensors(0, pages, "cpu")
    q = q.contiguous()
    ours = prepared((q, k, v, out), fp.Dense(), given)
    inside = {"q": q, "k": k, "v": v}[where]
    overlapping = torch.as_strided(inside, out.shape, out.stride(), inside.storage_offset())
    before = overlapping.clone()
    with pytest.raises(fp.InvalidArgumentError, match="out is in the same memory as"):
        ours.run(q, k, v, overlapping)
    assert torch.equal(overlapping, before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"softmax_scale": -1.0}, "softmax_scale"),
        ({"final_chunk": [True]}, "final_chunk"),
    ],
)
def test_mistakes_are_refused_when_it_is_made(changes, words):
    given, pages = layout("cpu")
    with pytest.raises(fp.InvalidArgumentError, match=words):
        prepared(tensors(0, pages, "cpu"), fp.Dense(), given, **changes)


@pytest.mark.parametrize("device", DEVICES)
def test_dense_keys(device):
    assert dense_keys(fp.Dense(), device) == 0
    assert dense_keys(fp.FlashPrefill(), device) == (3072 if device == "cuda" else 0)
