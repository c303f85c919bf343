"""Key lists on a GPU: attention over lists, against float64, and Gather's selection, against the reference.

Lists made by hand may name keys in kept blocks, keys between a tile's rows and keys of the future; a list of
Gather's has none of these. The small cases are for compute-sanitizer as well: `-k small` (CONTRIBUTING.md).
"""

import dataclasses

import numpy as np
import pytest
import torch

import flashprefill as fp
from attend_case import Case
from test_attend import F16, by_name, check, paged, rect, run, varlen
from test_select import inputs, packed
from test_select import paged as paged_inputs


@pytest.fixture(autouse=True)
def seed():
    """Make a case the same whichever cases run before it."""
    torch.manual_seed(1)
    np.random.seed(1)


# ---------------------------------------------------------------- attention


def listed(case, per_list, segment_tiles=1, reach="before"):
    """Give a case lists of `per_list` keys: "before" the segment, or "anywhere" in the sequence."""
    case.segment_tiles, case.lists = segment_tiles, []
    tokens = segment_tiles * case.tile_tokens
    for b in range(case.batch):
        prefix, part = case.k_len[b] - case.q_len[b], []
        for _ in range(case.mask_heads):
            head = []
            for begin in range(0, case.q_len[b], tokens):
                end = prefix + begin if reach == "before" else case.k_len[b]
                count = min(end, per_list() if callable(per_list) else per_list)
                head.append(np.sort(np.random.choice(end, count, replace=False)).tolist() if count else [])
            part.append(head)
        case.lists.append(part)
    return case


def apart(case):
    """Leave out of the lists what lies in kept blocks, so that no step needs to look."""
    for b, part in enumerate(case.lists):
        for h, head in enumerate(part):
            for i, one in enumerate(head):
                tiles = case.keep[b][h, i * case.segment_tiles : (i + 1) * case.segment_tiles]
                kept = tiles.any(0).cpu()
                head[i] = [key for key in one if not kept[key // case.block_size]]
    return case


def ragged():
    """A number of keys that is seldom whole steps."""
    return int(np.random.randint(0, 400))


SMALL = [
    ("lists", lambda: listed(rect(300, 600, density=0.2), 150)),
    ("shared", lambda: listed(rect(200, 500, hq=6, hk=2, share=True, density=0.2), 150, 2)),
    *[(f"d{d}", lambda d=d: listed(rect(300, 600, d=d, density=0.2), 150)) for d in (64, 256)],
    ("fp16", lambda: listed(rect(300, 600, dtype=F16, density=0.2), 150)),
    ("varlen", lambda: listed(varlen([(100, 100), (0, 0), (213, 400)], density=0.2), ragged)),
    *[
        (f"page {n}", lambda n=n: listed(paged([(100, 100), (213, 500), (1, 65)], n, density=0.2), ragged))
        for n in (64, 16, 1)
    ],
    ("anywhere", lambda: listed(rect(300, 600, density=0.2), 200, 2, "anywhere")),
    ("anywhere d256", lambda: listed(rect(300, 600, d=256, density=0.2), 200, 1, "anywhere")),
]
MORE = [
    ("only lists", lambda: listed(rect(1000, 1500, density=0, diagonal=False), 333)),
    ("empty lists", lambda: listed(rect(700, density=0.3), 0)),
    ("every key", lambda: listed(rect(500, 900, density=0.3), 10**6, 1, "anywhere")),
    ("every key before", lambda: apart(listed(rect(500, 900, density=0), 10**6))),
    ("apart", lambda: apart(listed(rect(1000, 3000, hq=8, hk=2, share=True, density=0.1), 700, 4))),
    ("exact steps", lambda: listed(rect(512, 2048, density=0, block_size=32), 256)),
    ("one key", lambda: listed(rect(512, 2048, density=0, block_size=32), 1)),
    (
        "blocks of 32",
        lambda: listed(rect(1024, hq=8, hk=2, share=True, block_size=32, density=0.1), ragged, 4),
    ),
    ("blocks of 48", lambda: listed(rect(777, 1900, block_size=48, density=0.2), ragged)),
    ("blocks of 1024", lambda: listed(rect(777, 5000, block_size=1024, density=0.2), ragged)),
    ("everything kept", lambda: listed(rect(700, density=1.0), 100)),
    ("batch 3", lambda: listed(rect(300, 800, b=3, hq=6, hk=2, density=0.2), ragged, 2)),
    ("one query", lambda: listed(rect(1, 1333, density=0.2), 100)),
    *[(f"d{d}", lambda d=d: listed(rect(700, 1200, d=d, density=0.2), ragged)) for d in (40, 80, 96, 192)],
    *[
        (
            f"group {g}",
            lambda g=g: listed(rect(700, 1000, hq=2 * g, hk=2, share=True, density=0.1), ragged, 3),
        )
        for g in (1, 2, 3, 5, 7, 12)
    ],
    (
        "anywhere, shared",
        lambda: listed(rect(700, hq=8, hk=2, share=True, density=0.1), ragged, 5, "anywhere"),
    ),
    ("anywhere, pages", lambda: listed(paged([(300, 900), (64, 64)], 8, density=0.2), ragged, 2, "anywhere")),
    ("many tiles", lambda: listed(rect(3000, hq=64, hk=8, density=0.05), 500)),
    (
        "40k keys",
        lambda: listed(rect(200, 40000, hq=8, hk=2, share=True, block_size=16, density=0.01), 5000, 2),
    ),
    ("large scores", lambda: listed(rect(1000, density=0.2, scale=3.0), 300)),
]


@by_name(SMALL)
def test_small(make):
    """One of every kind."""
    check(make())


@by_name(MORE)
def test_attend_equals_reference(make):
    """All shapes, layouts, dtypes; lists of none and of all keys, in kept blocks and in the future."""
    check(make())


def test_future_changes_nothing():
    """Rows before token t are the same bits whatever stands from t on, though lists name such keys."""
    case = run(listed(rect(900, density=0.3), 300, 2, "anywhere"))
    first = case.out.clone()
    case.k[:, 500:] = float("nan")
    case.v[:, 500:] = 1000
    case.launch()
    torch.cuda.synchronize()
    assert torch.equal(first[:, :500], case.out[:, :500])


def test_keys_that_are_in_no_list_are_not_read():
    """Values of keys that a tile does not attend to may be NaN."""
    case = listed(rect(256, 2048, density=0), 300, 2)
    for head in case.lists[0]:
        head[0] = case.lists[0][0][0]  # one list for all heads: they share keys
    used = torch.zeros(2048, dtype=torch.bool)
    used[case.lists[0][0][0]] = True
    used[2048 - 256 :] = True  # blocks of the diagonal
    case.v[:, ~used.cuda()] = float("nan")
    check(case)


def test_device_lists_are_clamped():
    """Counts and keys that make no sense lead nowhere outside the keys, and rows are finite."""
    case = rect(512, 2048, density=0.1)
    case.segment_tiles, case.lists = 1, [[[list(range(100))] * case.tiles(0)] * case.mask_heads]
    case.prepare()
    case.key_lists[..., 0] = 1 << 30
    case.key_lists[..., 2::3] = -(1 << 31)
    case.key_lists[..., 3::3] = (1 << 31) - 1
    case.launch()
    torch.cuda.synchronize()
    assert case.out.isfinite().all()


def test_same_bits_every_time():
    """Many launches give the same bits."""
    case = run(listed(rect(2048, 8192, hq=32, hk=8, share=True, density=0.05), 1500, 4))
    first = case.out.clone()
    for _ in range(300):
        case.out.fill_(float("nan"))
        case.launch()
        assert torch.equal(first, case.out)


# ---------------------------------------------------------------- selection


def moved(policy, factor):
    """Return the policy with its threshold made stricter (above 1) or looser."""
    fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    if fields["gain"] is not None:
        fields["gain"] *= factor
    if fields["budget"] is not None:
        fields["budget"] = min(0.999, fields["budget"] / factor)  # 1 would keep blocks, and list nothing
    return type(policy)(**fields)


def lists_of(mask, sequences):
    """Return all lists of a mask as sets, in one order."""
    return [set(one.tolist()) for b in range(sequences) for head in mask.keys(b) for one in head]


def bits_of(mask, b):
    """Return the words of a sequence's tiles: blocks alone, without those that lists touch."""
    begin, rows, _ = mask._sequence(b)
    first = begin // mask.tile_tokens + b
    return torch.as_tensor(mask.bits)[:, first : first + -(-rows // mask.tile_tokens)].cpu()


def differences(policy, q, k, sequences=1, **layout):
    """Return how the GPU's mask differs from the reference's, in words, or nothing."""
    there = {n: x.cuda() if torch.is_tensor(x) else x for n, x in layout.items()}
    masks = [fp.select(q.cuda(), k.cuda(), policy, **there) for _ in range(2)]
    exact, strict, loose = (
        fp.select(q, k, moved(policy, f), backend="reference", **layout) for f in (1.0, 1.03, 1 / 1.03)
    )
    full = policy.max_keys < 1000  # a full list's best are the same whatever the threshold
    found, again, same, inner, outer = (lists_of(m, sequences) for m in (*masks, exact, strict, loose))
    wrong = []
    for name, count in (
        ("lists changed", sum(a != b for a, b in zip(found, again, strict=True))),
        ("keys missing", 0 if full else sum(len(a - b) for a, b in zip(inner, found, strict=True))),
        ("keys too many", 0 if full else sum(len(a - b) for a, b in zip(found, outer, strict=True))),
        (
            "lists out of order",
            sum(
                list(one) != sorted(set(one.tolist()))
                for b in range(sequences)
                for head in masks[0].keys(b)
                for one in head
            ),
        ),
    ):
        if count:
            wrong.append(f"{count} {name}")
    apart = sum(len(a ^ b) for a, b in zip(found, same, strict=True))
    if apart > 0.02 * sum(map(len, same)) + 2 * len(same):
        wrong.append(f"{apart} keys apart of {sum(map(len, same))}")
    for b in range(sequences):
        if not torch.equal(*(bits_of(m, b) for m in (masks[0], exact))):
            wrong.append(f"bits of sequence {b}")
    tiles = -(-q.shape[0] // exact.tile_tokens)  # what lies between sequences is no tile's
    counts = [torch.as_tensor(m.counts).cpu().long()[:, :tiles] for m in (masks[0], exact)]
    if sequences == 1 and int((counts[0] - counts[1]).abs().max()) > 1:
        wrong.append("counts")
    return ", ".join(wrong)


BASE = {"sink_blocks": 1, "window_blocks": 2, "dense_tail_blocks": 0, "block_size": 32}
POLICIES = {
    "gain": fp.Gather(gain=0.02, **BASE),
    "gain, everything": fp.Gather(gain=1e-6, **BASE),
    "gain, little": fp.Gather(gain=0.5, **BASE),
    "budget": fp.Gather(gain=None, budget=0.2, **BASE),
    "budget of nearly all": fp.Gather(gain=None, budget=0.99, **BASE),
    "segments of 256": fp.Gather(gain=0.02, segment=256, **BASE),
    "segments of a tile": fp.Gather(gain=0.02, segment=1, **BASE),
    "a list per head": fp.Gather(gain=0.02, share_heads=False, segment=256, **BASE),
    "dense tail": fp.Gather(gain=0.02, segment=300, **{**BASE, "dense_tail_blocks": 5}),
    "blocks of 48, no sink": fp.Gather(gain=0.02, **{**BASE, "block_size": 48, "sink_blocks": 0}),
    "overflow": fp.Gather(gain=1e-4, max_keys=128, **BASE),
    "overflow by budget": fp.Gather(gain=None, budget=0.7, max_keys=200, **BASE),
}
LENGTHS = [(100, 300), (0, 0), (1, 130), (333, 1700)]


def selections():
    """Return named makers of (policy, inputs, layout)."""
    made = {}
    for name, policy in POLICIES.items():
        made[name] = lambda p=policy: (p, inputs(1500, 1800), {})
        made[f"{name}, packed"] = lambda p=policy: (p, *packed(LENGTHS))
    main = POLICIES["gain"]
    for page in (16, 1):
        made[f"pages of {page}"] = lambda page=page: (main, *paged_inputs(LENGTHS, page))
    for dim in (64, 80, 256):
        made[f"head_dim {dim}"] = lambda dim=dim: (main, inputs(700, 1300, dim=dim), {})
    made["fp16"] = lambda: (main, inputs(700, 1300, dim=64, dtype=F16), {})
    for group in (1, 2, 3, 5, 7, 8, 12, 16, 32, 40, 70):
        made[f"group {group}"] = lambda group=group: (main, inputs(500, 1300, 2 * group, 2, 64), {})
    for group in (1, 2, 4, 5, 40):
        made[f"small, group {group}"] = lambda group=group: (main, inputs(70, 300, group, 1, 64), {})
    for dim in (128, 256):
        made[f"small, head_dim {dim}"] = lambda dim=dim: (main, inputs(70, 300, 4, 1, dim), {})
    made["small, pages of 16"] = lambda: (main, *paged_inputs([(50, 120), (0, 0), (30, 230)], 16))
    for name, policy in {
        "gain": fp.Gather(gain=0.004, **BASE),
        "budget": fp.Gather(gain=None, budget=0.1, **BASE),
        "a list per head": fp.Gather(gain=0.004, share_heads=False, **BASE),
        "overflow": fp.Gather(gain=1e-4, max_keys=300, **BASE),
        "every key": fp.Gather(gain=1e-7, max_keys=20000, **BASE),
        "nine of ten": fp.Gather(gain=None, budget=0.9, max_keys=20000, **BASE),
    }.items():
        made[f"long, {name}"] = lambda p=policy: (p, inputs(200, 20000, 4, 1, 64), {})
    made["longer than tables"] = lambda: (main, inputs(100, (1 << 20) + 4000, 1, 1, 64), {})
    return [pytest.param(make, id=name) for name, make in made.items()]


@pytest.mark.parametrize("make", selections())
def test_selection_equals_reference(make):
    """Ids equal but for near ties, equal bits, ascending, all layouts; overflow keeps the best."""
    policy, (q, k), layout = make()
    assert differences(policy, q, k, layout["cu_seqlens_q"].numel() - 1 if layout else 1, **layout) == ""


def misleading(by_gain):
    """Return q and k whose sampled keys are unlike the others: 16 of each 128, as candidates.cuh takes them.

    A key's score is its first number. By gain the few keys of the sample that matter seem not to be worth
    it, so that the list seems to end above the many others; by budget all that matter are in the sample, and
    seem to be eight times as many.
    """
    tokens = 20000
    make = torch.Generator().manual_seed(3)
    key = torch.arange(tokens)
    sampled = key % 128 // 16 == key // 128 * 5 % 8
    score = torch.full((tokens,), -20.0) if by_gain else torch.randn(tokens, generator=make) - 3
    few = key[sampled & (key > 200) & (key < 19000)][:: 250 if by_gain else 3]
    score[few] = 4.6875 if by_gain else 4.0
    if by_gain:
        score[key[~sampled][2000:6000]] = 4.0
    k = torch.zeros(tokens, 1, 64)
    k[:, 0, 0] = score
    q = torch.zeros(100, 2, 64)
    q[..., 0] = 8.0
    return q.bfloat16(), k.bfloat16()


@pytest.mark.parametrize("by_gain", [True, False], ids=["gain", "budget"])
def test_a_sample_that_misleads(by_gain):
    """Lists do not depend on how well a sample of the keys tells where they end."""
    policy = fp.Gather(gain=0.02, **BASE) if by_gain else fp.Gather(gain=None, budget=0.08, **BASE)
    q, k = misleading(by_gain)
    exact = fp.select(q, k, policy, backend="reference")
    assert 1000 < len(lists_of(exact, 1)[0]) < 4000
    assert differences(policy, q, k) == ""


@pytest.mark.parametrize(
    "policy", [POLICIES["overflow"], POLICIES["overflow by budget"]], ids=["gain", "budget"]
)
def test_overflow_keeps_the_best(policy):
    """A full list holds the reference's keys but for near ties, and says how many were wanted."""
    q, k = inputs(600, 1800)
    mask = fp.select(q.cuda(), k.cuda(), policy)
    exact = fp.select(q, k, policy, backend="reference")
    room = policy.max_keys
    wanted = torch.as_tensor(mask.key_lists).cpu()[..., :2].long()
    expected = torch.as_tensor(np.asarray(exact.key_lists))[..., :2].long()
    assert (wanted[..., 0] == expected[..., 0]).all()
    assert ((wanted[..., 1] - expected[..., 1]).abs() <= 0.02 * expected[..., 1] + 2).all()
    assert (wanted[..., 1] > room).any()
    pairs = list(zip(lists_of(mask, 1), lists_of(exact, 1), strict=True))
    assert sum(len(a ^ b) for a, b in pairs) <= 0.04 * sum(len(b) for _, b in pairs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_scores_that_are_no_numbers_count_for_nothing(bad):
    """One bad key is in no list, and the others are as without it."""
    q, k = inputs(500, 1300)
    k[200] = bad
    assert differences(POLICIES["gain"], q, k) == ""


def test_prefill_equals_select_and_attend():
    """The operator's bits are those of its parts, in a graph too, where another key is chosen at a replay."""
    q, k = (x.cuda() for x in inputs(4500, 4500, 8, 2))
    v = torch.randn_like(k)
    policy = fp.Gather(gain=0.01, **BASE)
    whole = fp.prefill_attention(q, k, v, policy)
    assert torch.equal(whole, fp.attend(q, k, v, fp.select(q, k, policy)))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fp.prefill_attention(q, k, v, policy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fp.prefill_attention(q, k, v, policy)
    k.copy_(k.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, fp.prefill_attention(q, k, v, policy))


def test_a_sequence_alone_and_in_a_batch():
    """Its output over the same lists has the same bits."""
    lengths = [(700, 2000), (333, 3000), (1, 130)]
    together = run(listed(varlen(lengths, density=0.1), ragged))
    for b in range(len(lengths)):
        q = together.queries(together.q, b)[None].contiguous()
        k, v = (together.keys(t, b)[None].contiguous() for t in (together.k, together.v))
        alone = run(Case(q, k, v, keep=[together.keep[b]], lists=[together.lists[b]]))
        assert torch.equal(alone.out[0], together.queries(together.out, b))


def test_everything_is_kept_with_empty_lists():
    """A budget of 1, and a sequence that is all sink and window: bits alone."""
    for policy, tokens in ((fp.Gather(gain=None, budget=1.0), 900), (fp.Gather(window_blocks=100), 900)):
        q, k = (x.cuda() for x in inputs(tokens, tokens))
        mask = fp.select(q, k, policy)
        assert mask.density == 1 and all(one == set() for one in lists_of(mask, 1))


def test_refusals():
    """What is not there is refused by name."""
    q, k = (x.cuda() for x in inputs(900, 900))
    v = torch.randn_like(k)
    with pytest.raises(fp.UnsupportedError, match="mean correction"):
        fp.prefill_attention(q, k, v, fp.Gather(mean_correction=True))
    case = listed(rect(300, density=0.3, correct=True), 10)
    with pytest.raises(fp.UnsupportedError, match="mean correction"):
        run(case)
    case = listed(rect(300, density=0.3, target="portable"), 10)
    with pytest.raises(fp.UnsupportedError, match="Hopper"):
        run(case)
