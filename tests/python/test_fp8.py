"""FP8 caches: e4m3 keys and values with scales give what the dequantised cache gives."""

import ml_dtypes
import numpy as np
import pytest
import torch

import flashprefill as fp
from oracle import error, tensors

E4M3 = torch.float8_e4m3fn
HEADS = {"batch": 2, "kv_heads": 2}


def quantised(x, scale):
    """x [batch, tokens, kv_heads, dim] as e4m3, and what that stands for."""
    factor = torch.as_tensor(scale, dtype=torch.float32).expand(2, 2)[:, None, :, None]
    stored = (x / factor).clamp(-448, 448).to(E4M3)
    return stored, stored.float() * factor


SCALES = {
    "tensor": (0.05, 0.2),
    "heads": (torch.tensor([0.05, 0.3]), torch.tensor([0.2, 0.1])),
    "sequences": (torch.tensor([[0.05, 0.3], [0.1, 1.0]]), torch.tensor([[0.2], [0.4]])),
    "none": (1.0, 1.0),
}
POLICIES = [
    fp.Dense(),
    fp.FlashPrefill(alpha=0.6, block_size=32, dense_tail_blocks=0, share_heads=True, mean_correction=True),
    fp.Sketch(mass=0.5, block_size=32, window_blocks=1, dense_tail_blocks=0, mean_correction="summary"),
    fp.XAttention(threshold=0.5, block_size=32, stride=8),
    fp.FlexPrefill(gamma=0.6, block_size=32, min_budget=32),
    fp.Gather(budget=0.3, block_size=32, mean_correction=True, dense_tail_blocks=0),
    fp.SampleAttention(coverage=0.5, block_size=32),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.kind)
@pytest.mark.parametrize("kind", SCALES)
def test_an_fp8_cache_is_its_dequantised_one(engine, kind, policy):
    q, k, v = tensors(7, (2, 300, 4, 40), (2, 400, 2, 40))
    (k8, k_full), (v8, v_full) = (quantised(x, scale) for x, scale in zip((k, v), SCALES[kind], strict=True))
    scales = {} if kind == "none" else dict(zip(("k_scale", "v_scale"), SCALES[kind], strict=True))
    mask = fp.select(q, k8, policy, **engine, **({"k_scale": scales["k_scale"]} if scales else {}))
    expected_mask = fp.select(q, k_full, policy, **engine)
    # Means are rounded to bf16 where keys are FP8, so near ties may differ.
    differ = sum(int((mask.dense(b) != expected_mask.dense(b)).sum()) for b in range(2))
    assert differ <= 0.02 * sum(expected_mask.dense(b).numel() for b in range(2))
    out, lse = fp.attend(q, k8, v8, mask, return_lse=True, **engine, **scales)
    expected, expected_lse = fp.attend(q, k_full, v_full, mask, return_lse=True, **engine)
    tolerance = 1e-2 if mask.mean_correction else 2e-5
    assert error(out, expected) < tolerance and error(lse, expected_lse) < tolerance
    both = fp.prefill_attention(q, k8, v8, policy, **engine, **scales)
    assert torch.equal(both, fp.attend(q, k8, v8, mask, **engine, **scales))


def test_pages_of_fp8(engine):
    q, k, v = tensors(8, (300, 4, 64), (384, 2, 64), torch.bfloat16)
    scale = torch.tensor([0.02, 0.5])
    k8, v8 = ((x.float() / scale[:, None]).clamp(-448, 448).to(E4M3) for x in (k, v))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    pages = [torch.empty(24, 16, 2, 64, dtype=E4M3) for _ in range(2)]
    for page, x in zip(pages, (k8, v8), strict=True):
        page.view(torch.uint8)[order] = x.view(torch.uint8).view(24, 16, 2, 64)
    policy = fp.FlashPrefill(alpha=0.5, block_size=32, dense_tail_blocks=0)
    places = {"cu_seqlens_q": [0, 300], "seqused_k": [384], "block_table": order[None].int()}
    out = fp.prefill_attention(q, *pages, policy, **places, k_descale=scale, v_descale=scale, **engine)
    expected = fp.prefill_attention(q, k8, v8, policy, k_scale=scale, v_scale=scale, **engine)
    assert torch.equal(out, expected)
    places |= {"cu_seqlens_q": [0, 1]}
    one = fp.prefill_attention(q[-1:], *pages, fp.Dense(), **places, k_scale=scale, v_scale=scale, **engine)
    full = [x.float() * scale[:, None] for x in (k8, v8)]
    assert error(one, fp.prefill_attention(q[-1:].float(), *full, fp.Dense(), **engine)) < 1e-2


def test_fp8_queries_become_bf16(engine):
    q, k, v = tensors(9, (2, 130, 4, 32), (2, 130, 2, 32))
    scale = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    by_head = scale.repeat_interleave(2, dim=1)[:, None, :, None]
    q8 = (q / by_head).clamp(-448, 448).to(E4M3)
    expected = fp.prefill_attention((q8.float() * by_head).bfloat16(), k, v, fp.Dense(), **engine)
    out = fp.prefill_attention(q8, k, v, fp.Dense(), q_descale=scale, **engine)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    packed = fp.prefill_attention(
        q8.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), fp.Dense(),
        cu_seqlens_q=[0, 130, 260], cu_seqlens_k=[0, 130, 260], q_descale=scale, **engine,
    )  # fmt: skip
    assert torch.equal(packed, expected.flatten(0, 1))
    assert error(fp.prefill_attention(q8, k, v, fp.Dense(), **engine),
                 fp.prefill_attention(q8.bfloat16(), k, v, fp.Dense(), **engine)) == 0  # fmt: skip


def test_numpy_takes_ml_dtypes(engine):
    q, k, v = (x.numpy() for x in tensors(10, (150, 4, 32), (200, 2, 32)))
    k8, v8 = ((x / 0.25).astype(ml_dtypes.float8_e4m3fn) for x in (k, v))
    out = fp.prefill_attention(q, k8, v8, fp.Dense(), k_scale=0.25, v_scale=[0.25], **engine)
    full = [x.astype(np.float32) * np.float32(0.25) for x in (k8, v8)]
    assert np.abs(out - fp.prefill_attention(q, *full, fp.Dense(), **engine)).max() < 2e-5
    q8 = (q / 0.5).astype(ml_dtypes.float8_e4m3fn)
    scaled = fp.prefill_attention(q8, k, v, fp.Dense(), q_descale=np.float32(0.5), **engine)
    plain = fp.prefill_attention(q8.astype(np.float32) / 2, k, v, fp.Dense(), **engine)
    assert scaled.dtype == ml_dtypes.bfloat16 and np.abs(scaled.astype(np.float32) - plain).max() < 2e-2


def test_what_is_refused():
    q, k, v = tensors(11, (40, 4, 32), (40, 2, 32))
    k8, v8 = k.to(E4M3), v.to(E4M3)

    def refuses(match, *inputs, **options):
        with pytest.raises((TypeError, ValueError), match=match):
            fp.prefill_attention(*inputs, fp.Dense(), **options)

    e5m2 = torch.float8_e5m2
    refuses("k.dtype is torch.float8_e5m2; .* or torch.float8_e4m3fn for keys and values", q, k.to(e5m2), v)
    refuses("q.dtype is torch.float8_e5m2", q.to(e5m2), k, v)
    refuses("k_scale is given; it must be None where k is torch.float32", q, k, v, k_scale=1.0)
    refuses("v_descale is given; it must be None where v_scale is", q, k8, v8, v_scale=1.0, v_descale=1.0)
    refuses("q_descale is given; it must be None where q is", q, k8, v8, q_descale=1.0)
    refuses(r"k_scale.shape is \(3,\); it must be one number, \(2,\)", q, k8, v8, k_scale=[1.0, 1.0, 1.0])
    refuses(r"k_scale\[0\]\[1\] is 0; it must be finite and above 0", q, k8, v8, k_scale=[1.0, 0.0])
    refuses("v_scale is a str; it must be a number", q, k8, v8, v_scale="much")
    numpy = [x.numpy() for x in (q, k, v)]
    refuses("k.dtype is float8_e5m2", numpy[0], numpy[1].astype(ml_dtypes.float8_e5m2), numpy[2])


def test_a_nan_key_reaches_the_rows_that_see_it(engine):
    q, k, v = tensors(12, (64, 2, 32), (64, 1, 32))
    k8, v8 = k.to(E4M3), v.to(E4M3)
    clean = fp.prefill_attention(q, k8, v8, fp.Dense(), **engine)
    k8.view(torch.uint8)[40] = 0x7F
    out = fp.prefill_attention(q, k8, v8, fp.Dense(), **engine)
    assert torch.equal(out[:40], clean[:40]) and out[40:].isnan().all()


def test_compiled_as_called():
    q, k, v = tensors(13, (200, 4, 32), (200, 2, 32))
    k8, v8, scale = k.to(E4M3), v.to(E4M3), torch.tensor([0.5, 2.0])

    def call(q, k, v):
        return fp.prefill_attention(q, k, v, fp.FlashPrefill(), k_scale=scale, v_scale=scale)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k8, v8), call(q, k8, v8))
