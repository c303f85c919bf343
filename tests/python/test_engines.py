"""What the plugins for engines share: options, the division of batches, counters, the version gate."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

import flashprefill as fp
from flashprefill.engines import metrics, options, sparse
from flashprefill.engines.host import Host
from flashprefill.engines.rows import split
from flashprefill.guard import GuardSummary

TINY = {"sink_blocks": 1, "window_blocks": 1, "dense_tail_blocks": 1, "block_size": 64}


def test_split():
    asked = options.parse({"parameters": TINY, "min_chunk": 200})
    assert asked.forced_keys == 128
    parts = split([0, 1, 301, 501, 700, 900], [9, 300, 128, 500, 900], [False] + [True] * 4, None, asked)
    assert [(s.first, s.past, s.begin, s.end) for s in parts.spans] == [(1, 2, 1, 301), (4, 5, 700, 900)]
    assert parts.dense == [0, 2, 3]
    assert parts.dense_rows == {"decode": 1, "short": 200 + 199}
    assert parts.sparse_rows == 500
    assert parts.dense_range([0, 1, 301, 501, 700, 900]) is None
    assert parts.spans[0].final == [True]


def test_prompts_that_a_kernel_would_keep_whole_are_the_engines():
    asked = options.parse({"parameters": TINY})
    batch = [0, 3072, 6145], [3072, 3073], [True, True], None, asked
    assert split(*batch).dense == []
    parts = split(*batch, short_keys=3072)
    assert parts.dense == [0] and parts.dense_rows == {"short": 3072} and parts.spans[0].keys == [3073]


def test_what_a_cache_leaves_of_a_prompt_is_sparse_on_request():
    asked = options.parse({"parameters": TINY, "min_chunk": 1})
    parts = split([0, 1, 10, 11], [500, 900, 700], [False, True, True], None, asked)
    assert parts.dense == [0] and parts.spans[0].rows == [9, 1]


def test_batches_that_warm_an_engine_up_are_not_counted():
    counters = metrics.Metrics(logging.getLogger("some.engine"))
    before = counters.snapshot()
    with counters.paused():
        counters.count_batch(split([0, 1, 301], [9, 300], [False, True], None, options.parse("dense")))
        counters.count_dense("decode", 7)
        counters.count_later(torch.ones(3, dtype=torch.int32))
        counters.count_call(3)
    assert counters.snapshot() == before
    counters.count_dense("decode", 7)
    assert counters.snapshot()["dense_rows"] == {"decode": 7}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1.5, "flashprefill"),
        ("flash", "one of"),
        ({"alpha": 0.1}, "option"),
        ({"policy": "sketch", "parameters": {"alhpa": 0.1}}, "alhpa"),
        ({"parameters": {"alpha": -1}}, "alpha"),
        ({"parameters": 3}, "parameters"),
        ({"min_chunk": 0}, "min_chunk"),
        ({"first_dense_layers": True}, "first_dense_layers"),
        ({"first_dense_layers": -1}, "first_dense_layers"),
        ({"log_seconds": "x"}, "log_seconds"),
        ({"metrics_hook": "module"}, "metrics_hook"),
    ],
)
def test_mistakes_are_named(value, words):
    with pytest.raises((ValueError, TypeError), match=words):
        options.parse(value)


seen: list[dict[str, Any]] = []


def hook(numbers):
    seen.append(numbers)


def test_metrics(caplog, monkeypatch):
    counters = metrics.Metrics(logging.getLogger("some.engine"))
    asked = replace(options.parse("dense"), metrics_hook=f"{__name__}:hook", log_seconds=0.0)
    with caplog.at_level(logging.INFO, "some.engine"):
        counters.tick(asked)
        assert not caplog.records, "no news"
        counters.count_batch(split([0, 1, 301], [9, 300], [False, True], None, asked))
        counters.count_later(torch.tensor([[3, 4], [2, 0]], dtype=torch.int32))
        counters.count_call(18)
        counters.tick(asked)
        counters.tick(asked)
    (record,) = caplog.records
    assert "300 rows in 1 chunks sparse at density 0.500, 1 rows dense (1 decode)" in record.message
    assert len(seen) == 1 and seen[0] == counters.snapshot()
    assert seen[0]["density"] == 0.5 and seen[0]["dense_rows"] == {"decode": 1}

    monkeypatch.setattr(f"{__name__}.hook", lambda numbers: 1 / 0)
    counters._hooks.clear()
    counters.count_call(1)
    with caplog.at_level(logging.ERROR, "some.engine"):
        counters.tick(asked)
    assert "not called again" in caplog.text


@pytest.mark.parametrize(
    ("version", "known"),
    [("0.32.0", True), ("0.32", True), ("0.32.1.dev3", True), ("0.5.23", True), ("0.5.23.post1", True)]
    + [("0.33.0", False), ("0.320.0", False), ("0.5.24", False), ("0.5.2", False), ("0.5.231", False)],
)
def test_versions(version, known, caplog):
    host = Host("Engine", "some.engine", ("0.32", "0.5.23"))
    with caplog.at_level(logging.ERROR, "some.engine"):
        assert host.knows(version) == known
    if not known:
        assert f"this is Engine {version}, and the plugin knows 0.32, 0.5.23 only" in caplog.text


def test_what_is_announced(caplog):
    host = Host("Engine", "some.engine", ())
    assert not host.announced
    with caplog.at_level(logging.INFO, "some.engine"):
        assert host.announce(["", "a sliding window", "", "first_dense_layers"], fp.Dense()) == 2
        assert host.announce(["", "a sliding window", "", "first_dense_layers"], fp.Dense()) == 2
    (record,) = caplog.records
    assert host.announced and record.levelno == logging.INFO
    assert "2 of 4 layers of a kind" in record.message and "1 stay dense: a sliding window" in record.message
    with caplog.at_level(logging.WARNING, "some.engine"):
        assert host.announce(["a sliding window"], fp.Dense()) == 0
    assert caplog.records[-1].levelno == logging.WARNING


def paged(lengths, page=16, heads=4, kv_heads=2, dim=64):
    """Queries, a cache whose pages are out of order, and its table, for whole prompts of these lengths."""
    make = torch.Generator().manual_seed(sum(lengths))
    pages = [-(-n // page) for n in lengths]
    q = torch.randn(sum(lengths), heads, dim, generator=make)
    k, v = (torch.randn(sum(pages), page, kv_heads, dim, generator=make) for _ in range(2))
    order = torch.randperm(sum(pages), generator=make).int()
    table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    for row, (here, past) in enumerate(zip(pages, torch.tensor(pages).cumsum(0).tolist(), strict=True)):
        table[row, :here] = order[past - here : past]
    return q, k, v, table


def keep_near(layer, q, k):
    """A selection in Python: the first block, the diagonal and the one before it."""
    return fp.select(q, k, fp.Streaming(block_size=64, sink_blocks=1, window_blocks=1))


@pytest.mark.parametrize("policy", ["sketch(gain=0.3)", f"{__name__}:keep_near"], ids=["library", "python"])
@pytest.mark.parametrize("mode", ["observe", "strict", "repair(target=0.999, rows=40)"])
def test_a_guard_measures_what_layers_keep(mode, policy, caplog):
    lengths, layers = [700, 900, 40], 3
    q, k, v, table = paged(lengths)
    parameters = TINY if policy.startswith("sketch") else {"block_size": 64}
    asked = options.parse({"policy": policy, "parameters": parameters, "guard": mode})
    host = Host("Engine", "some.engine", ())
    starts = [0, 700, 1600, 1640]
    parts = split(starts, lengths, [True] * 3, None, asked)
    calls = [sparse.call_of(span, torch.tensor(lengths, dtype=torch.int32), table) for span in parts.spans]
    plan = sparse.Plan(host, asked, parts, calls)
    plan.engine_rows, out = slice(1600, 1640), torch.zeros_like(q)
    for layer in range(layers):
        assert sparse.run(plan, q, k, v, out, 0.125, lambda *_: None, layer)

    reports = []
    for layer in range(layers):
        alone = {
            "softmax_scale": 0.125,
            "cu_seqlens_q": torch.tensor([0, 700, 1600], dtype=torch.int32),
            "seqused_k": torch.tensor(lengths[:2], dtype=torch.int32),
            "block_table": table[:2],
            "max_seqlen_q": 900,
            "max_seqlen_k": 900,
        }
        expected, stats = fp.prefill_attention(
            q[:1600], k, v, asked.policy, **alone, guard=asked.guard.at_layer(layer), return_stats=True
        )
        reports.append(stats.guard)
    torch.testing.assert_close(out[:1600], expected)  # the last layer's, whose rows were drawn by its number
    summary = GuardSummary.of(reports)
    found = host.metrics.snapshot()["guard"]
    assert found["heads"] == 2 * 4 * layers and found["recall"] == pytest.approx(summary.recall, abs=1e-5)
    assert found["at_least"] == pytest.approx(summary.certificate, abs=1e-5)
    assert {name: found[name] for name in summary.outcomes} == summary.outcomes
    with caplog.at_level(logging.INFO, "some.engine"):
        host.metrics.tick(replace(asked, log_seconds=0.0))
    assert caplog.messages[-1].endswith(f"; {summary}")
    again = host.metrics.snapshot()
    assert "recall 1.000: nothing was left out" in metrics.line(again, again)  # between the two nothing was


def test_a_guard_of_an_engine_has_no_state():
    learns = fp.Guard("repair", state=fp.GuardState())
    settings = {"first_dense_layers": 0, "min_chunk": None, "log_seconds": 1.0, "metrics_hook": None}
    with pytest.raises(ValueError, match="state"):
        options.value_of("sketch", {}, **settings, guard=learns)
    value = options.value_of("sketch", {}, **settings, guard=fp.Guard("repair", target=0.95, rows=16))
    assert value["guard"] == "repair(target=0.95, rows=16)"
    assert options.parse(value).guard == fp.Guard("repair", target=0.95, rows=16)
    with pytest.raises(ValueError, match="guard"):
        options.parse({"guard": "look"})
