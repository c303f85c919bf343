"""The attend kernel on a GPU against a float64 reference.

Every output starts as NaN, so an element that was not written is an error too. The small cases, one for each
kind of loading, mask and layout, are for compute-sanitizer as well: `-k small` (CONTRIBUTING.md).
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attend_case import Case

LIMIT = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def seed():
    """Make a case the same whichever cases run before it."""
    torch.manual_seed(1)


def rand(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Return normal values on the device."""
    return torch.randn(*shape, device="cuda").to(dtype)


def with_random_mask(case: Case, density: float, diagonal: bool = True) -> Case:
    """Keep blocks at random, and the diagonal if wanted."""
    case.keep = []
    for b in range(case.batch):
        blocks = max(1, -(-case.k_len[b] // case.block_size))
        keep = torch.rand(case.mask_heads, max(1, case.tiles(b)), blocks, device="cuda") < density
        for m in range(case.tiles(b)):
            full, visible = case.full_visible(b, m)
            if diagonal:
                keep[:, m, full:visible] = True
        case.keep.append(keep[:, : case.tiles(b)])
    return case


def rect(
    lq: int,
    lk: int | None = None,
    hq: int = 4,
    hk: int = 1,
    d: int = 128,
    dtype: torch.dtype = BF16,
    b: int = 1,
    density: float | None = None,
    diagonal: bool = True,
    **more,
) -> Case:
    """A batch of equal lengths."""
    lk = lk or lq
    case = Case(
        rand(b, lq, hq, d, dtype=dtype),
        rand(b, lk, hk, d, dtype=dtype),
        rand(b, lk, hk, d, dtype=dtype),
        **more,
    )
    return with_random_mask(case, density, diagonal) if density is not None else case


def varlen(
    lengths: list[tuple[int, int]],
    hq: int = 4,
    hk: int = 2,
    d: int = 128,
    density: float | None = None,
    **more,
) -> Case:
    """Packed sequences of these lengths of queries and keys."""
    cu_q, cu_k = [0], [0]
    for lq, lk in lengths:
        cu_q.append(cu_q[-1] + lq)
        cu_k.append(cu_k[-1] + lk)
    case = Case(
        rand(cu_q[-1], hq, d), rand(cu_k[-1], hk, d), rand(cu_k[-1], hk, d), cu_q=cu_q, cu_k=cu_k, **more
    )
    return with_random_mask(case, density) if density is not None else case


def paged(
    lengths: list[tuple[int, int]],
    page: int,
    hq: int = 4,
    hk: int = 2,
    d: int = 128,
    density: float | None = None,
    dtype: torch.dtype = BF16,
    **more,
) -> Case:
    """The same with keys in pages in random order."""
    cu_q = [0]
    for lq, _ in lengths:
        cu_q.append(cu_q[-1] + lq)
    columns = max(-(-lk // page) for _, lk in lengths) + 1
    count = columns * len(lengths) + 3
    table = torch.randperm(count, device="cuda")[: columns * len(lengths)].view(len(lengths), -1)
    k, v = rand(count, page, hk, d, dtype=dtype), rand(count, page, hk, d, dtype=dtype)
    for b, (_, lk) in enumerate(lengths):  # poison past the end
        slots = torch.arange(columns * page, device="cuda") >= lk
        where = (
            table[b].repeat_interleave(page)[slots],
            torch.arange(columns * page, device="cuda")[slots] % page,
        )
        k[where] = float("nan")
        v[where] = float("nan")
    case = Case(
        rand(cu_q[-1], hq, d, dtype=dtype),
        k,
        v,
        cu_q=cu_q,
        used_k=[lk for _, lk in lengths],
        table=table.int().contiguous(),
        **more,
    )
    return with_random_mask(case, density) if density is not None else case


FIRST = [
    ("dense 128", lambda: rect(128)),
    ("dense 256", lambda: rect(256)),
    ("dense 1024", lambda: rect(1024, hq=8, hk=2)),
    ("sparse 2048", lambda: rect(2048, hq=8, hk=2, density=0.3)),
    ("many tiles 1500 x 64 heads", lambda: rect(1500, hq=64, hk=8, density=0.5)),
]
MORE = [
    *[(f"dense {n}", lambda n=n: rect(n)) for n in (1, 17, 127, 129, 257, 997)],
    ("batch 3", lambda: rect(300, b=3, hq=6, hk=2, density=0.5)),
    ("prefix 37", lambda: rect(200, 237, hq=6, hk=2)),
    ("prefix 1000 sparse", lambda: rect(333, 1333, density=0.4)),
    ("one query", lambda: rect(1, 1333, density=0.4)),
    ("not causal", lambda: rect(333, 777, causal=False)),
    ("not causal sparse", lambda: rect(333, 777, causal=False, density=0.5, diagonal=False)),
    ("empty rows", lambda: rect(700, density=0.15, diagonal=False)),
    ("nothing kept", lambda: rect(300, density=0, diagonal=False)),
    ("fp16", lambda: rect(1000, density=0.5, dtype=F16)),
    ("large scores", lambda: rect(1000, density=0.5, scale=3.0)),
    *[(f"d{d}", lambda d=d: rect(700, d=d, density=0.5)) for d in (64, 256, 80, 96, 40, 192)],
    *[(f"d{d} fp16 dense", lambda d=d: rect(1100, d=d, dtype=F16)) for d in (64, 256)],
    ("d256 many", lambda: rect(1100, d=256, hq=40, hk=8, density=0.6)),
    ("d64 many", lambda: rect(1100, d=64, hq=48, hk=8, density=0.6)),
    *[
        (f"shared group {g}", lambda g=g: rect(700, hq=2 * g, hk=2, share=True, density=0.4))
        for g in (1, 2, 3, 4, 5, 7, 12)
    ],
    ("shared dense prefix", lambda: rect(500, 777, hq=8, hk=2, share=True)),
    ("shared d64", lambda: rect(700, hq=6, hk=2, share=True, density=0.4, d=64)),
    ("shared d256", lambda: rect(700, hq=6, hk=2, share=True, density=0.4, d=256)),
    ("varlen", lambda: varlen([(100, 100), (0, 0), (513, 700), (1, 64), (0, 40), (260, 260)])),
    ("varlen sparse", lambda: varlen([(100, 100), (513, 1700), (1, 64), (1260, 1260)], density=0.4)),
    (
        "varlen shared",
        lambda: varlen([(100, 100), (0, 0), (513, 1700), (1, 64)], hq=6, share=True, density=0.4),
    ),
    ("varlen of 70", lambda: varlen([(17 * i % 90, 17 * i % 90 + i) for i in range(70)], density=0.6)),
    *[
        (f"block {n}", lambda n=n: rect(777, 900, density=0.4, block_size=n))
        for n in (16, 32, 48, 64, 80, 256, 384, 1024)
    ],
    *[
        (f"block {n} d256", lambda n=n: rect(777, 900, density=0.4, block_size=n, d=256))
        for n in (16, 48, 64, 256)
    ],
    ("block 16 no diagonal", lambda: rect(777, 900, density=0.1, block_size=16, diagonal=False)),
    ("40k keys, block 16", lambda: rect(100, 40000, hq=2, density=0.1, block_size=16)),
    *[
        (f"page {n}", lambda n=n: paged([(100, 100), (513, 1700), (1, 65)], n, density=0.4))
        for n in (128, 64, 16, 48, 256, 1, 8, 24, 100)
    ],
    ("page 16 dense", lambda: paged([(300, 1001), (200, 200)], 16)),
    ("page 1 d256", lambda: paged([(300, 1001), (200, 200)], 1, d=256, density=0.5)),
    ("page 5 d64 fp16", lambda: paged([(300, 1001), (200, 200)], 5, d=64, density=0.5, dtype=F16)),
    ("page 16 d80 shared", lambda: paged([(300, 1001), (200, 200)], 16, d=80, share=True, density=0.5)),
    ("page 16 block 32", lambda: paged([(300, 1001), (200, 200)], 16, block_size=32, density=0.5)),
    ("corrected", lambda: rect(1000, density=0.3, correct=True)),
    ("corrected, 200 blocks", lambda: rect(500, 200 * 16 + 5, density=0.1, block_size=16, correct=True)),
    (
        "corrected not causal",
        lambda: rect(300, 1001, density=0.3, correct=True, causal=False, diagonal=False),
    ),
    ("corrected nothing kept", lambda: rect(1000, density=0, diagonal=False, correct=True)),
    (
        "corrected shared varlen",
        lambda: varlen([(100, 900), (0, 0), (513, 1700)], share=True, density=0.2, correct=True),
    ),
    ("corrected page 1", lambda: paged([(100, 900), (513, 1700)], 1, density=0.2, correct=True)),
    (
        "corrected page 64 d256",
        lambda: paged([(100, 900), (513, 1700)], 64, d=256, density=0.2, correct=True),
    ),
    (
        "corrected d64 40k keys",
        lambda: rect(100, 40000, hq=2, d=64, density=0.05, block_size=16, correct=True),
    ),
    ("no lse", lambda: rect(300, lse_wanted=False)),
]


SMALL = [  # one of every kind of loading, mask and layout: a second or two each under compute-sanitizer
    ("sparse", lambda: rect(300, density=0.5)),
    *[(f"sparse d{d}", lambda d=d: rect(300, d=d, density=0.5)) for d in (64, 256)],
    ("fp16", lambda: rect(300, dtype=F16)),
    ("shared", lambda: rect(200, hq=6, hk=2, share=True, density=0.4)),
    ("varlen", lambda: varlen([(100, 100), (0, 0), (213, 400)], density=0.4)),
    *[(f"block {n}", lambda n=n: rect(300, density=0.4, block_size=n)) for n in (16, 48)],
    *[
        (f"page {n}", lambda n=n: paged([(100, 100), (213, 500), (1, 65)], n, density=0.4))
        for n in (128, 64, 24, 16, 8, 1)
    ],
    *[(f"page {n} d256", lambda n=n: paged([(100, 300)], n, d=256, density=0.5)) for n in (16, 1)],
    ("page 16 d64", lambda: paged([(100, 300)], 16, d=64, density=0.5)),
    ("corrected", lambda: rect(1000, density=0.3, correct=True)),
    (
        "corrected, 200 blocks",
        lambda: rect(300, 200 * 16 + 5, hq=2, density=0.1, block_size=16, correct=True),
    ),
    (
        "corrected not causal",
        lambda: rect(300, 1001, density=0.3, correct=True, causal=False, diagonal=False),
    ),
    (
        "corrected shared varlen",
        lambda: varlen([(100, 900), (0, 0), (213, 700)], share=True, density=0.2, correct=True),
    ),
    *[
        (f"corrected page {n}", lambda n=n: paged([(100, 400)], n, density=0.3, correct=True))
        for n in (16, 1)
    ],
]


def where(case: Case) -> str:
    """Return the error of the first sequence by head, and in the worst head by 16 rows and columns."""
    if case.q_len[0] == 0:
        return ""
    e = (case.queries(case.out, 0).double() - case.reference()[0][0]).abs().nan_to_num(nan=9e9)
    by_head = e.amax((0, 2))
    lines = ["heads " + " ".join(f"{x:.0e}" for x in by_head.tolist()[:16])]
    e = e[:256, by_head.argmax()]
    for row in range(0, e.shape[0], 16):
        worst = (f"{x.max().item():.0e}" for x in e[row : row + 16].split(16, -1))
        lines.append(f"{row:4d}  " + " ".join(worst))
    return "\n".join(lines)


def run(case: Case) -> Case:
    """Attend, and wait."""
    case.prepare()
    case.launch()
    torch.cuda.synchronize()
    return case


def check(case: Case) -> None:
    """Compare a case with its reference."""
    error, lse_error = run(case).errors()
    assert error <= LIMIT[case.q.dtype] and lse_error <= 2e-3, (
        f"out {error:.1e} lse {lse_error:.1e}\n{where(case)}"
    )


def strided() -> Case:
    """q, k and v as views of one fused projection, whose rows are longer than the heads."""
    x = rand(1, 600, 8 * 128)
    q, k, v = (x[..., a * 128 : b * 128].unflatten(-1, (-1, 128)) for a, b in ((0, 4), (4, 6), (6, 8)))
    return Case(q, k, v)


def by_name(cases):
    """Parametrize a test by named makers of cases."""
    return pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in cases])


@by_name(SMALL)
def test_small(make):
    """One of every kind."""
    check(make())


@by_name(FIRST + MORE + [("strided", strided)])
def test_equals_reference(make):
    """All shapes, layouts, dtypes, masks."""
    check(make())


def test_future_changes_nothing():
    """Rows before token t are the same bits whatever k (NaN too) and finite v stand at t and after."""
    case = run(rect(900, density=0.5))
    first = case.out.clone()
    case.k[:, 500:] = float("nan")
    case.v[:, 500:] = 1000
    case.launch()
    torch.cuda.synchronize()
    assert torch.equal(first[:, :500], case.out[:, :500])


def test_same_bits_every_time():
    """A thousand launches give the same bits."""
    case = run(rect(4096, hq=32, hk=8, density=0.4))
    first = case.out.clone()
    for _ in range(1000):
        case.out.fill_(float("nan"))
        case.launch()
        assert torch.equal(first, case.out)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("n", [1024, 4096])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_as_exact_as_cudnn(dtype, d, n, scale):
    """The largest error of dense outputs is at most 1.2 times that of cuDNN's attention.

    With scores four times as large it was 1.27 to 1.75 times on an H200, so there the limit is 2. Why is not
    known; the outputs are those of the kernel as it was before this test.
    """
    case = run(rect(n, hq=8, hk=2, d=d, dtype=dtype, scale=scale * d**-0.5))
    q, k, v = (x.transpose(1, 2) for x in (case.q, case.k, case.v))
    k, v = (x.repeat_interleave(4, 1) for x in (k, v))
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            theirs = scaled_dot_product_attention(q, k, v, is_causal=True, scale=case.scale)
    except RuntimeError as error:
        pytest.skip(f"cuDNN: {error}")
    exact = case.reference()[0][0]
    largest = [
        ((out.double() - exact).abs() / exact.abs().clamp_min(1)).max().item()
        for out in (case.out[0], theirs[0].transpose(0, 1))
    ]
    assert largest[0] <= (1.2 if scale == 1 else 2.0) * largest[1], largest
