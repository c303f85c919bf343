"""What the plugins for engines share: options, the division of batches, counters, the version gate."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

import flashprefill as fp
from flashprefill.engines import metrics, options
from flashprefill.engines.host import Host
from flashprefill.engines.rows import split

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
