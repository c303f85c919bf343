"""Several ranks: attention, its refusals, and models, over gloo, beside one process."""

import pytest

import flashprefill as fp

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from ranks import World  # noqa: E402
from shard_case import Case, same  # noqa: E402

Zigzag, Ulysses = fp.distributed.Zigzag, fp.distributed.Ulysses
FEW = dict(
    sink_blocks=1, window_blocks=1, dense_tail_blocks=1, block_size=32
)  # so that there is much to choose
PAPER = fp.FlashPrefill(alpha=0.5, **FEW)
POOLED = fp.FlashPrefill(alpha=0.5, query_pool=16, **FEW)
SHARED = fp.FlashPrefill(alpha=0.5, share_heads=True, **FEW)
ZIGZAG = [
    fp.Dense(),
    PAPER,
    POOLED,
    fp.FlashPrefill(alpha=0.5, query_pool=24, min_blocks=3, **FEW),
    fp.FlashPrefill(alpha=0.5, query_pool=16, mean_correction=True, **FEW),
    SHARED,
    fp.FlashPrefill(alpha=0.5, query_pool=5, share_heads=True, mean_correction=True, **FEW),
    fp.Sketch(mass=0.6, **FEW),
    fp.Sketch(alpha=0.5, share_heads=True, **FEW),
    fp.Streaming(**FEW),
    fp.XAttention(threshold=0.8, block_size=32),
    fp.XAttention(head_thresholds=(0.5, 0.6, 0.7, 0.8), block_size=32),
    fp.RRAttention(threshold=0.8, block_size=32),
    fp.Prism(mass=0.6, block_size=32),
]
ULYSSES = [
    fp.Dense(),
    SHARED,
    fp.Sketch(mass=0.6, **FEW),
    fp.XAttention(head_thresholds=(0.5, 0.6, 0.7, 0.8), block_size=32),
    fp.FlexPrefill(gamma=0.8, min_budget=64, block_size=32),
    fp.MInference(heads=(("vertical_and_slash", 40, 90), ("stream_llm", 32, 64)) * 2, block_size=32),
    fp.SampleAttention(coverage=0.7, block_size=32),
    fp.SpargeAttn(cdf=0.7),
    fp.Gather(budget=0.3, segment=128, **FEW),
    fp.S2O(tau=0.2, segment=128, **FEW),
]


@pytest.fixture(scope="module")
def world():
    world = World(8)
    yield world
    world.close()


def _density_below_1(policy, density):
    assert density == 1 if isinstance(policy, fp.Dense) else 0 < density < 0.95


@pytest.mark.parametrize("policy", ZIGZAG, ids=str)
def test_zigzag_has_the_bits_of_one_process(world, policy):
    unit = 64 if policy.share_heads else 128
    _density_below_1(policy, same(world, 2, Case(policy, (1024,), unit=unit)))
    same(world, 4, Case(policy, (1157,), unit=unit, options={"head_groups": 1}))


@pytest.mark.parametrize("policy", ULYSSES, ids=str)
def test_ulysses_has_the_bits_of_one_process(world, policy):
    _density_below_1(policy, same(world, 2, Case(policy, (777,), layout="Ulysses")))


@pytest.mark.parametrize(
    "case",
    [
        Case(POOLED, (600, 600), batched=True),
        Case(POOLED, (900, 130, 1), options={"head_groups": 2}),
        Case(POOLED, (600,), (128,)),
        Case(POOLED, (600,), (333,)),  # chunks meet inside of pages and blocks
        Case(SHARED, (600, 500), (77, 0), heads=(6, 2, 32), unit=42),  # tiles of 42 tokens
        Case(POOLED, (500, 500), (9, 9), batched=True),
        Case(POOLED, (1000,), (3000,), options={"final_chunk": False}),  # a prefix of several shares
        Case(fp.XAttention(block_size=32), (600,), (96,), options={"softmax_scale": 0.3}),
        Case(POOLED, (1000,), options={"head_groups": 2}, dtype=torch.bfloat16),
        Case(POOLED, (700,), heads=(6, 6, 48), options={"head_groups": 3}, dtype=torch.float16),
        Case(POOLED, (300,)),  # ranks without rows
        Case(POOLED, (900, 700), (50, 0), layout="Ulysses", options={"final_chunk": [False, True]}),
        Case(POOLED, (400, 400), (9, 9), layout="Ulysses", batched=True),
        Case(POOLED, (400,), heads=(3, 3, 32), layout="Ulysses"),  # three KV heads on four ranks
    ],
    ids=repr,
)
def test_layouts(world, case):
    same(world, 4, case)


@pytest.mark.parametrize("rounds", [1, 4, 5])
@pytest.mark.parametrize("policy", [POOLED, SHARED, fp.XAttention(block_size=32)], ids=str)
def test_finer_chunks(world, policy, rounds):
    """Chunks of long prompts, and heads that travel as theirs do: a quarter first."""
    unit = 64 if policy.share_heads else 128
    same(world, 2, Case(policy, (1700,), unit=unit, rounds=rounds, heads=(16, 8, 32), grouped=True))
    same(world, 4, Case(policy, (1900, 400), (96, 0), unit=unit, rounds=rounds, grouped=True))


@pytest.mark.parametrize("tail", [0, 2, 5, 20])
def test_a_dense_tail_may_begin_in_another_ranks_chunk(world, tail):
    policy = fp.FlashPrefill(alpha=0.7, sink_blocks=1, window_blocks=1, dense_tail_blocks=tail, block_size=64)
    same(world, 2, Case(policy, (1100,)))
    same(world, 4, Case(policy, (800, 600), (0, 70), options={"final_chunk": [True, False]}))


def test_early_chunks_that_are_all_sink(world):
    policy = fp.FlashPrefill(alpha=0.5, sink_blocks=8, window_blocks=2, block_size=32, dense_tail_blocks=0)
    same(world, 2, Case(policy, (1024,)))


def test_eight_ranks(world):
    same(world, 8, Case(POOLED, (2050,)))
    same(world, 8, Case(POOLED, (300,)))
    same(world, 8, Case(POOLED, (300,), layout="Ulysses"))


def test_one_rank(world):
    same(world, 1, Case(POOLED, (500,), (100,)))
    same(world, 1, Case(POOLED, (500,), layout="Ulysses"))


# ------------------------------------------------------------------- divisions


@pytest.mark.parametrize("layout", [Zigzag, lambda *a, **k: Zigzag(*a, **k, rounds=4), Ulysses])
@pytest.mark.parametrize("tokens", [[0], [1], [127], [128], [1024], [1025], [3, 500, 0, 2049]])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_row_is_on_one_rank(layout, tokens, ranks):
    shards = [layout(tokens, ranks=ranks, rank=rank, prefix=7) for rank in range(ranks)]
    numbers = torch.cat([shards[0].numbers(rank) for rank in range(ranks)])
    assert sorted(numbers.tolist()) == list(range(sum(tokens)))
    x = torch.arange(sum(tokens))
    assert torch.equal(torch.cat([part.shard(x) for part in shards]), numbers)
    assert all(part.rows == len(part.positions()) == len(part.shard(x)) for part in shards)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_have_equally_much_to_do(ranks):
    shards = [Zigzag(131072, ranks=ranks, rank=rank, tail=0) for rank in range(ranks)]
    seen = [int((part.positions() + 1).sum()) for part in shards]
    assert max(seen) == min(seen)
    shards = [Zigzag(131072, ranks=ranks, rank=rank) for rank in range(ranks)]
    assert all(len(part.chunks(part.rank)) <= 5 for part in shards)
    squares = [int(((part.positions() // 4096) ** 2).sum()) for part in shards]
    two = [Zigzag(131072, ranks=ranks, rank=rank, rounds=2) for rank in range(ranks)]
    squares_of_two = [int(((part.positions() // 4096) ** 2).sum()) for part in two]
    assert (max(squares) - min(squares)) * 3 < max(squares_of_two) - min(squares_of_two)
    tails = [int((part.positions() >= 131072 - 256).sum()) for part in shards]
    assert tails == [128, 128] + [0] * (ranks - 2)  # a tile each


def test_no_chunk_of_few_rows():
    """Few rows are computed as decoding is, whose bits differ."""
    for tokens in (129, 1025, 2050, 4099):
        for rank in range(4):
            chunks = Zigzag(tokens, ranks=4, rank=rank).chunks(rank)
            assert all(chunk.end - chunk.begin >= 128 for chunk in chunks)


def test_cuda_attends_densely_up_to():
    """The numbers that zigzag.py has to know are the library's."""
    import re
    from pathlib import Path

    from flashprefill.distributed import zigzag

    header = (Path(__file__).parents[2] / "src/cuda/common/heuristics.h").read_text()
    found = re.search(r"EnergiesDenseUpToKeys.*portable \? (\d+) : (\d+);", header)
    assert [int(n) for n in found.groups()] == [zigzag.PORTABLE_DENSE_KEYS, zigzag.HOPPER_DENSE_KEYS]


# -------------------------------------------------------------------- refusals


def _call(group, layout, tokens, policy, change):
    q, k, v = fp.example_inputs(tokens, 4, 2, 32, dtype=torch.float32)
    rank = torch.distributed.get_rank(group)
    change = change.get(rank, change.get("all", {}))
    shards = getattr(fp.distributed, layout)(
        change.get("tokens", tokens), group, unit=change.get("unit", 128), prefix=change.get("prefix", 0)
    )
    q, k, v = (shards.shard(x[: sum(shards.tokens)]) for x in (q, k, v))
    q = q.to(change.get("dtype", q.dtype))
    k, v = (x.to(change.get("dtype", k.dtype)) for x in (k, v))
    k = k[: len(k) - change.get("cut", 0)]
    policy = change.get("policy", policy)
    fp.distributed.prefill_attention(q, k, v, policy, shards=shards, **change.get("options", {}))


@pytest.mark.parametrize(
    ("policy", "change", "messages"),
    [
        (POOLED, {1: {"dtype": torch.bfloat16}}, "q.dtype of rank 1 is torch.bfloat16; it must be rank 0's"),
        (POOLED, {1: {"tokens": 500}}, "shards.tokens of rank 1"),
        (POOLED, {0: {"policy": PAPER}}, "policy of rank 1 is flashprefill"),
        (POOLED, {1: {"options": {"softmax_scale": 0.5}}}, "softmax_scale of rank 1 is 0.5"),
        (POOLED, {1: {"cut": 5}}, ["rank 1 has refused its arguments: k.shape", "k.shape is"]),
        (POOLED, {"all": {"options": {"head_groups": 3}}}, "head_groups is 3; it must be a divisor of"),
        (SHARED, {"all": {"unit": 96}}, "shards.unit is 96; it must be a multiple of 64"),
        (POOLED, {"all": {"prefix": 30}}, "prefix is None; it must be keys and values"),
        (fp.FlexPrefill(), {}, "Zigzag can't give the result of one process; Ulysses does"),
        (fp.MInference(), {}, "minference selects for a tile by rows or keys that other ranks have"),
        (fp.SampleAttention(), {}, "Ulysses does"),
        (fp.SpargeAttn(), {}, "Ulysses does"),
        (fp.Gather(), {}, "Ulysses does"),
        (fp.Sketch(query_metric=True), {}, "Ulysses does"),
        (fp.XAttention(), {"all": {"prefix": 9}}, "prefix is"),
    ],
    ids=str,
)  # fmt: skip
def test_refusals_on_all_ranks(world, policy, change, messages):
    outcomes = world.outcomes(2, _call, "Zigzag", 512, policy, change)
    messages = [messages] * 2 if isinstance(messages, str) else messages
    for (fine, what), message in zip(outcomes, messages, strict=True):
        assert not fine
        assert message in what[1], what[2]
    same(world, 2, Case(POOLED, (300,)))  # the ranks go on


def test_ulysses_refuses_what_goes_by_numbers_of_heads(world):
    for fine, what in world.outcomes(2, _call, "Ulysses", 300, fp.RRAttention(), {}):
        assert not fine and "rrattention goes by heads' numbers" in what[1]


def test_refusals_of_divisions():
    with pytest.raises(fp.UnsupportedError, match="no process group"):
        Zigzag(1000)
    with pytest.raises(
        fp.InvalidArgumentError, match="rank is 3; it must be a rank of the group, from 0 to 1"
    ):
        Zigzag(1000, ranks=2, rank=3)
    with pytest.raises(fp.InvalidArgumentError, match="tokens is -1"):
        Zigzag(-1, ranks=1, rank=0)
    with pytest.raises(fp.ArgumentTypeError, match="tokens is 'many'"):
        Zigzag("many", ranks=1, rank=0)
    with pytest.raises(fp.InvalidArgumentError, match="tail is -1"):
        Zigzag(10, ranks=1, rank=0, tail=-1)
    with pytest.raises(fp.InvalidArgumentError, match="rounds is 0"):
        Zigzag(10, ranks=1, rank=0, rounds=0)
    with pytest.raises(fp.ArgumentTypeError, match="rounds is True"):
        Zigzag(10, ranks=1, rank=0, rounds=True)
    with pytest.raises(fp.InvalidArgumentError, match="unit is 0"):
        Ulysses(10, ranks=1, rank=0, unit=0)
    with pytest.raises(fp.InvalidArgumentError, match="prefix is a list of 2"):
        Zigzag([10], ranks=1, rank=0, prefix=[1, 2])
    shards = Zigzag(256, ranks=2, rank=0)
    with pytest.raises(fp.InvalidArgumentError, match=r"x.shape is \(5, 1\); it must be \(256, ...\)"):
        shards.shard(torch.zeros(5, 1))
    x = torch.zeros(128, 2, 16)
    with pytest.raises(fp.ArgumentTypeError, match="shards is a int"):
        fp.distributed.prefill_attention(x, x, x, shards=3)
