"""FP8 keys and values on a GPU: what the cache dequantised to q's dtype gives, to the bit, in every layout.

One pass multiplies the cache by its scales and rounds to q's dtype; everything else is as it is for such
keys. So a result equals that of the dequantised keys, one after another, and select chooses the same blocks.
The small cases are for compute-sanitizer too: `-k small`.
"""

import pytest
import torch

import flashprefill as fp
from attend_case import Case
from test_attend import BF16, F16, paged, rand, rect, varlen

E4M3 = torch.float8_e4m3fn
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
SCALES = ("none", "tensor", "heads", "sequences")


@pytest.fixture(autouse=True)
def seed():
    """Make a case the same whichever cases run before it."""
    torch.manual_seed(1)


def scale_of(kind: str, batch: int, heads: int) -> torch.Tensor | None:
    """Return scales [batch, heads] of a kind; those of a tensor or of heads as a broadcast view."""
    shape = {"none": None, "tensor": (1, 1), "heads": (1, heads), "sequences": (batch, heads)}[kind]
    if shape is None:
        return None
    return (torch.rand(*shape, device="cuda") * 0.05 + 0.005).expand(batch, heads)


def stored(case: Case, kind: str) -> Case:
    """Put a case's keys and values into FP8, with scales of this kind."""
    case.k_scale, case.v_scale = (scale_of(kind, case.batch, case.hk) for _ in range(2))
    for name, scale in (("k", case.k_scale), ("v", case.v_scale)):
        x = getattr(case, name)
        # A page may belong to any sequence, so what is stored does not know its scale: a tenth fits them all.
        x = x.float() if scale is None else x.float() * 10
        setattr(case, name, x.clamp(-448, 448).to(E4M3))
    return case


def dequantised(case: Case, b: int, **more) -> Case:
    """Return sequence b alone, its keys one after another in q's dtype, as the pass rounds them."""
    k, v = (
        (x.float() if scale is None else x.float() * scale[b][:, None]).to(case.q.dtype)[None].contiguous()
        for x, scale in ((case.keys(case.k, b), case.k_scale), (case.keys(case.v, b), case.v_scale))
    )
    keep = None if case.keep is None else [case.keep[b]]
    options = {"causal": case.causal, "correct": case.correct, "share": case.share, "target": case.target}
    options |= {"block_size": case.block_size, "math": case.math} | more
    return Case(case.queries(case.q, b)[None].contiguous(), k, v, keep=keep, **options)


def run(case: Case) -> Case:
    """Attend, and wait."""
    case.prepare()
    case.launch()
    torch.cuda.synchronize()
    return case


def check_bits(case: Case) -> None:
    """Compare out and lse of each sequence with those of the dequantised one."""
    run(case)
    for b in range(case.batch):
        if case.q_len[b] == 0:
            continue
        alone = run(dequantised(case, b))
        assert alone.out.isfinite().all()
        assert torch.equal(alone.out[0], case.queries(case.out, b)), b
        lse = case.lse[:, case.cu_q[b] : case.cu_q[b + 1]] if case.cu_q else case.lse[b]
        assert torch.equal(alone.lse[0], lse), b


LENGTHS = [(100, 100), (213, 500), (0, 0), (1, 65)]
CASES = {
    "batch": lambda **o: rect(300, 400, b=2, hk=2, density=0.5, **o),
    "dense d64": lambda **o: rect(300, d=64, **o),
    "d256": lambda **o: rect(300, d=256, density=0.5, **o),
    "d40 not causal": lambda **o: rect(130, 300, d=40, causal=False, **o),
    "fp16": lambda **o: rect(300, hk=2, dtype=F16, density=0.5, **o),
    "varlen": lambda **o: varlen(LENGTHS, density=0.4, **o),
    "varlen shared, corrected": lambda **o: varlen(LENGTHS, density=0.3, share=True, correct=True, **o),
    "blocks of 48": lambda **o: rect(300, density=0.5, block_size=48, **o),
    **{f"page {n}": lambda n=n, **o: paged(LENGTHS, n, density=0.4, **o) for n in (1, 16, 24, 128)},
    "page 16 d64 fp16": lambda **o: paged(LENGTHS, 16, d=64, dtype=F16, **o),
    "page 64 corrected": lambda **o: paged(LENGTHS, 64, density=0.3, correct=True, **o),
}


@pytest.mark.parametrize("target", ["sm90a", "portable"] if HOPPER else ["portable"])
@pytest.mark.parametrize("name", CASES)
def test_small(name, target):
    """One of every layout, mask, dtype and head_dim, with scales of every kind by turns."""
    kind = SCALES[list(CASES).index(name) % len(SCALES)]
    check_bits(stored(CASES[name](target=target), kind))


@pytest.mark.parametrize("kind", SCALES)
def test_scales(kind):
    """All kinds of scales, and strides of 0 where there is one for all."""
    check_bits(stored(rect(200, 300, b=3, hq=6, hk=3), kind))
    check_bits(stored(paged([(100, 300), (70, 70)], 16), kind))


def test_views():
    """A cache whose heads lie apart and whose K and V share an array, as vLLM's."""
    case = stored(rect(300, hk=2, hq=8), "heads")
    cache = torch.stack([case.k.view(torch.uint8), case.v.view(torch.uint8)], 2)  # [1, t, 2, h, d]
    case.k, case.v = (cache[:, :, i].view(E4M3) for i in (0, 1))
    check_bits(case)
    by_heads = cache.transpose(1, 3).contiguous().transpose(1, 3)
    case.k, case.v = (by_heads[:, :, i].view(E4M3) for i in (0, 1))
    check_bits(case)


def test_one_of_two():
    """FP8 keys beside 16-bit values, and the other way round."""
    for name in ("k", "v"):
        case = stored(rect(300, 400, hk=2, density=0.5), "heads")
        setattr(case, name, rand(1, 400, 2, 128))
        setattr(case, f"{name}_scale", None)
        check_bits(case)


def test_a_whole_cache_of_e4m3_numbers():
    """Every byte keeps its worth: 448, subnormals, both zeros, and NaN, which stays in its column."""
    numbers = torch.arange(256, device="cuda", dtype=torch.uint8)
    v = numbers.view(1, 1, 2, 128).repeat(1, 300, 1, 1).view(E4M3)
    case = Case(torch.zeros(1, 300, 2, 128, device="cuda", dtype=F16), v, v, target=None)
    case.k = torch.zeros_like(v.view(torch.uint8)).view(E4M3)
    run(case)
    exact = v[0].float().half()
    assert torch.equal(case.out[0].isnan(), exact.isnan()) and exact.isnan().sum() == 600
    assert torch.equal(case.out[0].nan_to_num(), exact.nan_to_num())


def error(case: Case) -> float:
    """Return the error of a one-sequence case over the output's norm."""
    exact = case.reference()[0][0]
    return ((case.queries(case.out, 0).double() - exact).norm() / exact.norm()).item()


def test_errors_are_those_of_the_dequantised_cache():
    """At most 5 % above bf16 math on the dequantised cache, against float64 over what is stored."""
    for kind in ("tensor", "heads"):
        case = run(stored(rect(2000, hq=8, hk=2, density=0.4), kind))
        other = run(dequantised(case, 0))
        exact = case.reference()[0][0]
        theirs = ((other.out[0].double() - exact).norm() / exact.norm()).item()
        assert error(case) <= 1.05 * theirs + 1e-9
        assert error(case) < 4e-3


@pytest.mark.skipif(not HOPPER, reason="8-bit products are Hopper's")
@pytest.mark.parametrize("kind", ["none", "heads"])
def test_eight_bits_small(kind):
    """8-bit products over FP8: V's images hold the cache's own numbers."""
    for make in (
        lambda: rect(1000, hq=4, hk=2, density=0.5, math=1),
        lambda: paged([(513, 1700)], 16, density=0.4, math=1),
    ):
        assert error(run(stored(make(), kind))) <= 0.045
    # Equal weights and 128 equal numbers of the cache sum up to that number.
    numbers = torch.arange(0, 126, device="cuda", dtype=torch.uint8)
    v = torch.zeros(1, 128, 1, 128, device="cuda", dtype=torch.uint8)
    v[..., :126] = numbers
    case = Case(torch.zeros(1, 128, 1, 128, device="cuda", dtype=BF16), v.view(E4M3), v.view(E4M3), math=1)
    case.k = torch.zeros_like(v).view(E4M3)
    if kind == "heads":
        case.v_scale = torch.full((1, 1), 0.37, device="cuda")
    run(case)
    exact = case.worth(case.v, 0)
    assert ((case.out[0].double() - exact).abs() <= exact * 2**-8 + 1e-6).all()


# ---------------------------------------------------------------- select, prefill, what is refused

POLICIES = [
    fp.FlashPrefill(alpha=0.3, query_pool=16, dense_tail_blocks=0),
    fp.FlashPrefill(alpha=0.3, share_heads=True, mean_correction=True, dense_tail_blocks=0),
    fp.Sketch(mass=0.5, window_blocks=1, dense_tail_blocks=0),
    fp.XAttention(threshold=0.5),
    fp.FlexPrefill(gamma=0.6, min_budget=256),
    fp.MInference(vertical=100, slash=300),
    fp.SampleAttention(coverage=0.5),
    fp.Streaming(),
    fp.Dense(),
]
N = 4000  # above what prefill attends to densely


@pytest.fixture(scope="module")
def cache():
    """q, and k and v with scales by head: in FP8, and dequantised."""
    torch.manual_seed(3)
    q, k, v = rand(1, N, 4, 128), rand(1, N, 2, 128), rand(1, N, 2, 128)
    k += 2 * rand(1, N // 100, 2, 128).repeat_interleave(100, 1)
    scale = torch.tensor([0.01, 0.03], device="cuda")
    k8, v8 = ((x.float() / scale[:, None]).clamp(-448, 448).to(E4M3) for x in (k, v))
    return q, (k8, v8), scale, [(x.float() * scale[:, None]).to(BF16) for x in (k8, v8)]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.kind)
def test_policies(cache, policy):
    """select keeps the blocks that it keeps of the dequantised keys; prefill gives their output."""
    q, (k8, v8), scale, (k, v) = cache
    scales = {"k_scale": scale, "v_scale": scale}
    mask, expected = fp.select(q, k8, policy, k_scale=scale), fp.select(q, k, policy)
    assert torch.equal(mask.dense(0), expected.dense(0))
    out, lse = fp.prefill_attention(q, k8, v8, policy, return_lse=True, **scales)
    wide, wide_lse = fp.prefill_attention(q, k, v, policy, return_lse=True)
    assert torch.equal(out, wide) and torch.equal(lse, wide_lse)
    assert torch.equal(
        fp.attend(q, k8, v8, mask, k_descale=scale, v_descale=scale), fp.attend(q, k, v, expected)
    )


def test_pages_and_a_guard(cache):
    """A paged cache by the Python API, with a guard that repairs: as the dequantised keys."""
    q, (k8, v8), scale, (k, v) = cache
    order = torch.randperm(N // 16, device="cuda")
    pages = [torch.empty(N // 16, 16, 2, 128, device="cuda", dtype=torch.uint8) for _ in range(2)]
    for page, x in zip(pages, (k8, v8), strict=True):
        page[order] = x.view(torch.uint8).view(N // 16, 16, 2, 128)
    policy = fp.FlashPrefill(alpha=0.5, query_pool=16, dense_tail_blocks=0)
    guard = fp.Guard(target=0.8, mode="repair")
    places = {"cu_seqlens_q": [0, N], "seqused_k": [N], "block_table": order[None].int()}
    paged_out = fp.prefill_attention(
        q[0], *(x.view(E4M3) for x in pages), policy, **places, k_scale=scale, v_scale=scale, guard=guard
    )
    assert torch.equal(paged_out, fp.prefill_attention(q, k, v, policy, guard=guard)[0])


def test_lengths_that_make_no_sense():
    """A sequence longer than its pages is reported and sees nothing; its neighbour is untouched."""
    case = stored(paged([(100, 300), (70, 70)], 16), "heads")
    first = run(case).out[100:].clone()
    case.used_k, case.max_k = [100000, 70], case.max_k
    run(case)
    assert torch.equal(case.out[100:], first)
    assert (case.out[:100] == 0).all()


def test_a_graph(cache):
    """Captured in a graph; the scales' and the cache's contents may change between replays."""
    q, (k8, v8), scale, _ = cache
    policy = fp.FlashPrefill(alpha=0.3, query_pool=16)
    k8, v8, scale = k8.clone(), v8.clone(), scale.clone()

    def call():
        return fp.prefill_attention(q, k8, v8, policy, k_scale=scale, v_scale=scale)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for factor in (1.0, 0.5):
        scale.mul_(factor)
        graph.replay()
        assert torch.equal(out, call())


def test_what_is_refused(cache):
    """Other formats by name, odd strides, mixed 16-bit dtypes."""
    q, (k8, v8), _, (k, _) = cache
    for dtype in (torch.float8_e5m2, torch.float8_e4m3fnuz):
        with pytest.raises(TypeError, match=f"k.dtype is {dtype}; .* or torch.float8_e4m3fn"):
            fp.prefill_attention(q, k.to(dtype), v8, fp.Dense())
    with pytest.raises(fp.UnsupportedError, match="k.dtype is 2; it must be q's"):
        fp.prefill_attention(q, k.half(), v8, fp.Dense())
    odd = Case(q, k8, v8)
    odd.k = torch.empty(1, N, 2, 132, device="cuda", dtype=torch.uint8)[..., :128].view(E4M3)
    with pytest.raises(fp.UnsupportedError, match="k and v in FP8 must be 8-byte aligned"):
        run(odd)
