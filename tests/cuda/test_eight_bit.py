"""Attention with 8-bit products on a Hopper GPU (fp_exec.math) against a float64 reference.

Limits come from a simulation of the kernel's arithmetic on normal values: 0.032 to 0.038 of the
output's norm.
The small cases are for compute-sanitizer too: `-k small`.
"""

import pytest
import torch

from attend_case import Case
from test_attend import FIRST, MORE, SMALL, by_name, paged, rand, rect, varlen, where

F16, BF16 = torch.float16, torch.bfloat16
INPUT, EIGHT = 0, 1
LIMIT = 0.045  # of the norm of the output
ROW_LIMIT = 0.12  # of a row's: one that sees a few keys has their rounding whole
LSE_LIMIT = 0.04

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="8-bit products are Hopper's",
)


@pytest.fixture(autouse=True)
def seed():
    """Make a case the same whichever cases run before it."""
    torch.manual_seed(1)


def takes(case: Case) -> bool:
    """Say whether the 8-bit kernel does a case."""
    return 64 < case.d <= 128 and case.block_size % 128 == 0


def eight(make):
    """Make a case with 8-bit products."""
    case = make()
    case.math = EIGHT
    return case


def run(case: Case) -> Case:
    """Attend, and wait."""
    case.prepare()
    case.launch()
    torch.cuda.synchronize()
    return case


def relative(case: Case) -> tuple[float, float, float]:
    """Return the error of out over its norm, the largest of a row over the row's, and the largest of lse."""
    outs, lses = case.reference()
    error = norm = worst_row = worst_lse = 0.0
    for b in range(case.batch):
        if case.q_len[b] == 0:
            continue
        e = (case.queries(case.out, b).double() - outs[b]).nan_to_num(nan=1e9)
        error += e.square().sum().item()
        norm += outs[b].square().sum().item()
        rows = e.norm(dim=-1) / outs[b].norm(dim=-1).clamp_min(1e-6)
        worst_row = max(worst_row, rows.max().item())
        if case.lse_wanted:
            got = (case.lse[:, case.cu_q[b] : case.cu_q[b + 1]] if case.cu_q else case.lse[b]).double()
            e = torch.where(got == lses[b], 0.0, (got - lses[b]).abs()).nan_to_num(nan=1e9)
            worst_lse = max(worst_lse, e.max().item())
    return (error / max(norm, 1e-12)) ** 0.5, worst_row, worst_lse


def check(case: Case, limit: float = LIMIT, lse_limit: float = LSE_LIMIT) -> None:
    """Compare a case with its reference."""
    error, row, lse = relative(run(case))
    seen = f"error {error:.4f} of the norm, {row:.3f} of a row's, lse {lse:.4f}\n{where(case)}"
    assert error <= limit and row <= ROW_LIMIT and lse <= lse_limit, seen


# Scores of a standard deviation of 34 are beyond what int8 can tell apart.
CASES = (
    [one for one in FIRST + MORE if one[0] != "large scores" and takes(one[1]())]
    if (torch.cuda.is_available())
    else []
)
SMALL_CASES = [one for one in SMALL if takes(one[1]())] if torch.cuda.is_available() else []


@by_name(SMALL_CASES)
def test_small(make):
    """One of every layout and mask."""
    check(eight(make))


@by_name(CASES)
def test_equals_reference(make):
    """All shapes, layouts, dtypes, masks."""
    check(eight(make))


def test_is_taken():
    """The mode changes bits and takes scratch memory; where there is no kernel for it, neither."""
    for d, block, changes in (
        (128, 128, True),
        (96, 256, True),
        (64, 128, False),
        (128, 64, False),
        (256, 128, False),
    ):
        case = run(rect(600, d=d, block_size=block))
        before, bytes_before = case.out.clone(), case.scratch.numel()
        case.math = EIGHT
        run(case)
        assert torch.equal(before, case.out) != changes, (d, block)
        assert (case.scratch.numel() > bytes_before + 600 * 128) == changes, (d, block)


def test_other_targets_go_on_in_16_bits():
    """The portable kernels have no such products: the same bits as without."""
    case = run(rect(600, target="portable"))
    before = case.out.clone()
    case.math = EIGHT
    assert torch.equal(before, run(case).out)


@pytest.mark.parametrize("math", [-1, 2])
def test_unknown_math_is_refused(math):
    """By name."""
    with pytest.raises(ValueError, match="math is"):
        run(rect(128, math=math))


# ---------------------------------------------------------------- sums, order, layouts


def test_long_flat_rows():
    """Equal weights of 128K keys sum up: with sums of 14 bits alone the error would be 0.93.

    The output is fp16, whose own rounding is 2.4e-4.
    """
    n = 131072
    q = torch.zeros(1, 128, 1, 128, device="cuda", dtype=F16)
    k, v = rand(1, n, 1, 128, dtype=F16), (rand(1, n, 1, 128, dtype=F16) + 0.5)
    case = run(Case(q, k, v, causal=False, math=EIGHT, lse_wanted=False))
    exact = v.double().mean(1, keepdim=True)
    error = (case.out.double() - exact).abs().max() / 0.5
    assert error < 1e-3, error
    # And with the values all alike nothing is lost but their rounding, of one part in 16 at most.
    v.fill_(0.4375)  # 7/16: exact in e4m3 with any scale of 448 / 2^n, here 448 / 0.4375 = 2^10
    run(case)
    assert (case.out.double() - 0.4375).abs().max() < 1e-3


def test_a_sink_is_not_lost():
    """One early key with most of the weight, seen last, and rows whose other weights are far below it."""
    case = rect(1024, hq=2, hk=1, math=EIGHT)
    direction = torch.randn(128, device="cuda").to(BF16)
    case.k[:, 0] = 2 * direction
    case.q += 0.35 * direction
    check(case, 0.06, lse_limit=0.06)  # its score is 8, of which int8 rounds off 0.6 %


def test_keys_with_an_offset():
    """What all keys have in common costs nothing: it is taken from them, and given back to the LSE."""
    case = rect(1024, math=EIGHT)
    case.k += 3 * torch.randn(128, device="cuda").to(BF16)
    error, _, lse = relative(run(case))
    assert error <= LIMIT and lse <= 0.06, (error, lse)


def test_same_bits_every_time():
    """Two hundred launches give the same bits."""
    case = run(rect(4096, hq=32, hk=8, density=0.4, math=EIGHT))
    first = case.out.clone()
    for _ in range(200):
        case.out.fill_(float("nan"))
        case.launch()
        assert torch.equal(first, case.out)


@pytest.mark.parametrize("page", [1, 16, 24, 128])
def test_pages_change_nothing(page):
    """Keys in pages give the bits of the same keys one after another."""
    case = run(paged([(513, 1700), (100, 100)], page, density=0.4, math=EIGHT))
    for b in range(2):
        k, v = (case.keys(t, b)[None].contiguous() for t in (case.k, case.v))
        alone = Case(case.queries(case.q, b)[None].contiguous(), k, v, keep=[case.keep[b]], math=EIGHT)
        assert torch.equal(run(alone).out[0], case.queries(case.out, b)), (page, b)


def test_alone_as_in_a_batch():
    """A packed sequence's bits do not depend on those beside it, corrected too."""
    case = run(varlen([(100, 100), (513, 1700), (0, 0), (260, 260)], density=0.4, correct=True, math=EIGHT))
    for b in (0, 1, 3):
        q, k, v = case.queries(case.q, b), case.keys(case.k, b), case.keys(case.v, b)
        alone = Case(
            *(x[None].contiguous() for x in (q, k, v)), keep=[case.keep[b]], correct=True, math=EIGHT
        )
        assert torch.equal(run(alone).out[0], case.queries(case.out, b)), b


# ---------------------------------------------------------------- values that are not ordinary


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_keys_that_are_not_finite(value):
    """Rows that attend to them are NaN, the others as exact as ever."""
    case = run(rect(700, math=EIGHT))
    clean = case.reference()[0][0]
    case.k[:, 300, :, 5] = value
    run(case)
    before, after = case.out[0, :300].double(), case.out[0, 300:]
    assert after.isnan().all()
    assert ((before - clean[:300]).norm() / clean[:300].norm()) < LIMIT


def test_values_that_are_not_finite():
    """They reach their own column of rows from their block on, and nothing else."""
    case = run(rect(700, math=EIGHT))
    clean = case.reference()[0][0]
    case.v[:, 300, :, 5] = float("inf")
    out = run(case).out[0]
    assert out[300:, :, 5].isnan().all()
    out, clean = (torch.cat([x[:, :, :5], x[:, :, 6:]], -1).double() for x in (out, clean))
    assert ((out - clean).norm() / clean.norm()) < LIMIT


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_queries_that_are_not_finite(value):
    """Their rows are NaN, others are untouched."""
    case = run(rect(300, math=EIGHT))
    clean = case.out.clone()
    case.q[:, 100, 1] = value
    out = run(case).out
    assert out[:, 100, 1].isnan().all()
    out[:, 100, 1] = clean[:, 100, 1]
    assert torch.equal(out, clean)


def test_means_that_are_not_finite():
    """A left-out block with an infinite value counts for rows it is corrected for, and for no others."""
    case = rect(1024, hq=2, hk=1, density=0, correct=True, math=EIGHT)
    case.v[:, 700] = float("inf")
    out = run(case).out[0]
    assert out[:640].isfinite().all()
    assert out[768:].isnan().all()


def test_a_key_channel_of_6e4():
    """The same for all keys, it drops out; finite, and exact, where bf16 is."""
    case = rect(1024, math=EIGHT)
    case.k[..., 5] = 6e4
    error, _, _ = relative(run(case))
    assert error <= LIMIT, error


def test_a_value_channel_of_6e4():
    """The same for all values, it is exact, and costs the other channels nothing."""
    case = rect(1024, math=EIGHT)
    case.v[..., 5] = 6e4
    case.v[..., 6] += 3
    run(case)
    exact = case.reference()[0][0]
    error = (case.out[0].double() - exact).norm(dim=(0, 1)) / exact.norm(dim=(0, 1))
    assert error[5] < 4e-3 and error[6] < 0.02
    others = [i for i in range(128) if i not in (5, 6)]
    assert error[others].norm() / len(others) ** 0.5 < LIMIT


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_one_large_channel(name):
    """Finite, and near what it was; the other channels of v lose bits, and do not vanish."""
    case = rect(1024, math=EIGHT)
    tensor = getattr(case, name)
    tensor[..., 7] *= 6e4 if name == "v" else 10
    run(case)
    assert case.out.isfinite().all() and case.lse.isfinite().all()
    exact = case.reference()[0][0]
    error = case.out[0].double() - exact
    if name == "v":
        others = [i for i in range(128) if i != 7]
        assert error[..., 7].norm() / exact[..., 7].norm() < LIMIT
        assert error[..., others].norm() / exact[..., others].norm() < 0.3
    else:
        assert error.norm() / exact.norm() < 0.25


def test_zeros():
    """Queries, keys and values of zeros, each alone and together."""
    for names in ("q", "k", "v", "qkv"):
        case = rect(300, math=EIGHT)
        for name in names:
            getattr(case, name).zero_()
        run(case)
        exact = case.reference()[0][0]
        assert (case.out[0].double() - exact).norm() <= LIMIT * exact.norm() + 1e-6, names
        assert case.lse.isfinite().all()


def test_wild_scales():
    """Tiny and huge inputs whose products are ordinary."""
    for factor in (1e-4, 1e4):
        case = rect(600, math=EIGHT)
        case.q *= factor
        case.k *= 1 / factor
        error, _, _ = relative(run(case))
        assert error <= LIMIT, factor


def test_the_future_moves_little():
    """Keys behind a row change its last bits at most, through the scale of its block and the center."""
    case = run(rect(900, density=0.5, math=EIGHT))
    first = case.out[:, :500].double()
    case.k[:, 500:] = rand(*case.k[:, 500:].shape)
    second = run(case).out[:, :500].double()
    assert (second - first).norm() / first.norm() < LIMIT


# ---------------------------------------------------------------- copies of small pages, in 16 bits


@pytest.mark.parametrize("page", [1, 8, 24])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_copied_pages(page, d):
    """A whole prompt in small pages is copied first: the bits of contiguous keys."""
    case = run(paged([(2048, 2048)], page, hq=8, hk=2, d=d, density=0.5))
    k, v = (case.keys(t, 0)[None].contiguous() for t in (case.k, case.v))
    alone = Case(case.queries(case.q, 0)[None].contiguous(), k, v, keep=case.keep)
    assert torch.equal(run(alone).out[0], case.out)
    assert case.scratch.numel() >= 2 * k.numel() * k.element_size()


def test_copied_pages_of_several_lengths():
    """Sequences shorter than the longest, one of them empty, with the correction."""
    case = run(paged([(1500, 1500), (300, 1100), (0, 0), (64, 70)], 1, hq=8, hk=2, density=0.4, correct=True))
    error, lse = case.errors()
    assert error <= 1.5e-2 and lse <= 2e-3, (error, lse)
