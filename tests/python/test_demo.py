"""The demo on a model of a few thousand weights: files, figures, report; and the parts it is made of."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import demo_model  # noqa: E402
from flashprefill import cli  # noqa: E402
from flashprefill.apps import demo, factors, heads, machine, measure, models, plots, prompt, report  # noqa: E402
from flashprefill.apps.errors import UsageError  # noqa: E402


@pytest.fixture(scope="module")
def results(model, tmp_path_factory):
    """One run of the whole demo, default methods and two depths: (results, folder, what it printed)."""
    out = tmp_path_factory.mktemp("demo")
    options = demo.Options(
        model=model,
        tokens=1500,
        depths=(0.5, 0.1),
        repeats=2,
        out=out,
        dtype="fp32",
        positions=64,
        continuation=4,
    )
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        returned = demo.run(options)
    return returned, out, printed.getvalue()


def test_results_hold_everything(results):
    returned, out, _ = results
    saved = json.loads((out / "results.json").read_text())
    assert saved == json.loads(json.dumps(returned))
    assert saved["schema"] == "flashprefill-demo/1"
    assert (
        saved["machine"]["cpu"]
        and saved["versions"]["torch"]
        and saved["command"].startswith("flashprefill")
        and saved["date"]
    )
    assert saved["model"]["dtype"] == "fp32" and (saved["model"]["layers"], saved["model"]["q_heads"]) == (
        3,
        4,
    )
    assert saved["prompt"]["tokens"] == 1500 and saved["prompt"]["depths"] == [0.5, 0.1]
    assert saved["settings"]["compared_positions"] == 64
    labels = [run["label"] for run in saved["runs"]]
    assert (
        labels[:2] == ["Dense (PyTorch SDPA)", "Dense, our kernel"]
        and len(labels) == 7
        and labels[-2:] == ["Sketch", "Gather"]
    )
    for run in saved["runs"]:
        for name in ("ttft_seconds", "attention_seconds", "select_seconds"):
            values = run[name]
            assert len(values["all"]) == 2 and values["min"] <= values["median"] <= values["max"]
        assert 0 < run["attention_seconds"]["median"] < run["ttft_seconds"]["median"]
        assert run["select_seconds"]["median"] < run["attention_seconds"]["median"]
        assert 0 < run["density"] <= 1 and run["kl_nats"] >= 0 and 0 <= run["top1_agreement"] <= 1
        assert [needle["depth"] for needle in run["needles"]] == [0.5, 0.1]
        assert all(isinstance(needle["found"], bool) for needle in run["needles"])
        assert run["dense_layers"] == {}


def test_dense_agrees_with_itself_and_policies_have_densities(results):
    runs = results[0]["runs"]
    dense, ours, published, shared = runs[:4]
    assert ours["policy"] == "dense" and ours["density"] == 1 and ours["top1_agreement"] > 0.99
    assert (
        dense["policy"] is None
        and dense["kl_nats"] == 0
        and dense["top1_agreement"] == 1
        and dense["density"] == 1
    )
    assert dense["attention_speedup"] == dense["ttft_speedup"] == 1
    assert published["policy"] == "flashprefill(alpha=0.12)" and "share_heads=true" in shared["policy"]
    assert np.array(published["density_by_layer_and_head"]).shape == (3, 4)
    assert published["density"] == pytest.approx(np.mean(published["density_by_layer_and_head"]), abs=1e-3)
    assert all(run["select_seconds"]["median"] > 0 for run in runs[2:])


def test_speed_ups_are_products(results):
    """What our dense kernel has over PyTorch's is told apart from what sparsity adds."""
    returned, out, printed = results
    runs = returned["runs"]
    ours = runs[1]
    assert ours["attention_speedup_over_our_dense"] == ours["ttft_speedup_over_our_dense"] == 1
    for run in runs:
        for what in ("attention", "ttft"):
            split = ours[f"{what}_speedup"] * run[f"{what}_speedup_over_our_dense"]
            assert split == pytest.approx(run[f"{what}_speedup"])
    assert returned["headline"] in printed and "kernel x" in returned["headline"]
    page = (out / "report.html").read_text()
    (first,) = re.findall(
        r"<div class=tile><b>([\d.]+)x</b><span>= [\d.]+x kernel x [\d.]+x sparsity: attention", page
    )
    assert first == f"{max(run['attention_speedup'] for run in runs[2:]):.1f}"
    assert "over our" in returned["table"]


def test_a_headline_names_both_factors():
    runs = [
        {"label": label, "policy": policy, "attention_speedup": attention, "ttft_speedup": first}
        for label, policy, attention, first in (
            ("Dense (PyTorch SDPA)", None, 1.0, 1.0),
            (factors.OURS, "dense", 4.9, 3.0),
            ("pooled", "flashprefill(alpha=0.12)", 15.65, 4.5),
        )
    ]
    attention, first = "15.7x = 4.9x kernel x 3.2x sparsity", "4.5x = 3.0x kernel x 1.5x sparsity"
    assert factors.headline(runs) == f"pooled: attention {attention}, first token {first}"
    assert factors.headline(runs[:2]) is None and factors.fastest(runs[:2]) is None


def test_the_tile_counts_policies_not_needles(results):
    returned, out, _ = results
    changed = json.loads(json.dumps(returned))
    for run in changed["runs"]:
        run["needles"] = [{**run["needles"][0], "found": True}]
    page = report.page(changed, out)
    assert "<b>5 of 5</b><span>policies found the needle (dense: 1 of 1)" in page
    assert "were kept whatever their scores" in page


def test_files_are_what_they_say(results):
    returned, out, _ = results
    assert set(returned["files"]) == {"results.json", "report.html", "times.png", "density.png", "masks.png"}
    assert {path.name for path in out.iterdir()} == set(returned["files"])
    for name in ("times.png", "density.png", "masks.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_heads_that_are_shown_differ(results):
    shown = results[0]["heads"]
    assert len(shown) == 5
    assert len({(head["layer"], head["head"]) for head in shown}) == len(shown)
    for head in shown:
        for mask in head["masks"].values():
            assert 0 < mask["density"] <= mask["recall"] + 0.5 and 0 < mask["recall"] <= 1.0001


def test_table_is_printed_and_aligned(results):
    returned, out, printed = results
    lines = returned["table"].splitlines()
    assert returned["table"] in printed and str(out) in printed
    rule = next(line for line in lines if set(line) == {"-", " "})
    ends = [match.end() for match in re.finditer("-+", rule)]
    assert len(ends) == len(demo.HEADER)
    for line in lines[lines.index(rule) + 1 :]:
        assert all(end == len(line) or line[end] == " " for end in ends if end <= len(line))
    assert lines[lines.index(rule) + 1].startswith("Dense (PyTorch SDPA)")


def test_report_is_one_page_that_needs_nothing_else(results):
    returned, out, _ = results
    page = (out / "report.html").read_text()
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert page.count("data:image/png;base64,") == 3
    assert {begin for _, begin in re.findall(r"\b(src|href)\s*=\s*[\"']?(.{5})", page)} == {"data:"}
    assert not any(text in page for text in ("<script", "<link", "@import", "url("))
    for run in returned["runs"]:
        assert run["label"] in page
    for text in (
        "What was skipped",
        "How it was measured",
        "prefers-color-scheme:dark",
        returned["prompt"]["needle"],
        "median of 2 turns",
    ):
        assert text in page


def test_report_escapes_what_a_model_says(results):
    returned, out, _ = results
    changed = json.loads(json.dumps(returned))
    changed["runs"][0]["needles"][0]["continuation"] = "<script>alert(1)</script>"
    assert "<script" not in report.page(changed, out)


def test_command_line_with_own_policy_prompt_and_no_needle(model, tmp_path, capsys):
    text = tmp_path / "mine.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 40)
    out = tmp_path / "out"
    arguments = [
        "--model",
        str(model),
        "--prompt",
        str(text),
        "--no-needle",
        "--policy",
        "dense",  # our dense kernel has its row anyway
        "--policy",
        "streaming(window_blocks=1)",
    ]
    arguments += ["--quick", "--threads", "1", "--tokens", "900", "--dtype", "fp32", "--out", str(out)]
    threads = torch.get_num_threads()
    try:
        assert cli.main(["demo", *arguments]) == 0
    finally:
        torch.set_num_threads(threads)
    saved = json.loads((out / "results.json").read_text())
    assert (
        saved["settings"]["threads"] == 1
        and saved["prompt"]["source"] == "mine.txt"
        and saved["prompt"]["tokens"] == 900
    )
    dense, same, streaming = saved["runs"]
    assert (
        same["policy"] == "dense"
        and same["density"] == 1
        and same["kl_nats"] < 1e-5
        and same["top1_agreement"] > 0.99
    )
    assert streaming["density"] < 1 and streaming["needles"][0]["found"] is None
    assert dense["needles"][0]["continuation"] == same["needles"][0]["continuation"]
    assert "mine.txt" in (out / "report.html").read_text()
    assert capsys.readouterr().out.startswith(" ")


# ---------------------------------------------------------------- the parts


@pytest.fixture(scope="module")
def tokenizer(model):
    return models.load(model, "fp32").tokenizer


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompt_has_its_length_and_the_needle_at_its_depth(tokenizer, depth):
    made = prompt.build(tokenizer, 3000, depth)
    text = tokenizer.decode(made.ids)
    assert len(made.ids) == 3000
    assert (
        text.startswith("<user>")
        and text.endswith("<model>")
        and text.count(made.needle) == 1
        and made.question in text
    )
    assert text.index(made.needle) / len(text) == pytest.approx(depth, abs=0.2)
    before = text[: text.index(made.needle)].removeprefix("<user>").strip("\n")
    assert depth == 0.0 or before[-1] != " "


def test_prompt_without_chat_template_ends_in_the_start_of_the_answer(tmp_path):
    folder = demo_model.save(tmp_path / "plain", chat=False)
    made = prompt.build(models.load(folder, "fp32").tokenizer, 1200, 0.5)
    assert made.ids[0] == 0 and len(made.ids) == 1200


def test_prompt_from_a_short_file_and_from_nothing(tokenizer, tmp_path, monkeypatch):
    short = tmp_path / "short.txt"
    short.write_text("only this\n")
    assert len(prompt.build(tokenizer, 3000, None, short).ids) == 10
    with pytest.raises(UsageError, match="--tokens 50: must be at least"):
        prompt.build(tokenizer, 50, 0.5)
    with pytest.raises(UsageError, match="No such file"):
        prompt.build(tokenizer, 3000, 0.5, tmp_path / "missing.txt")
    monkeypatch.setattr(prompt, "LICENCES", tmp_path)
    assert len(prompt.build(tokenizer, 3000, 0.5).ids) == 3000  # Python's own source is left
    monkeypatch.setattr(prompt, "local_texts", lambda: iter(()))
    with pytest.raises(UsageError, match="give one with --prompt"):
        prompt.build(tokenizer, 3000, 0.5)


@pytest.mark.parametrize(
    ("words", "found"),
    [("It is 48213.", True), ("48,213", True), ("4 8 2 1 3", True), ("123456789", False), ("", False)],
)
def test_needle_is_found_however_it_is_written(words, found):
    assert prompt.Prompt(ids=[], source="", answer=prompt.ANSWER).found_in(words) is found


def test_long_stretches_the_rotary_base(model):
    plain, long = models.load(model, "fp32"), models.load(model, "fp32", stretch=models.ROPE_STRETCH)
    theta = plain.model.config.rope_parameters["rope_theta"]
    assert long.model.config.rope_parameters["rope_theta"] == 4 * theta
    slow = [m.model.rotary_emb.inv_freq[-1].item() for m in (plain.model, long.model)]
    assert slow[1] < 0.5 * slow[0]


def test_attention_mass_is_the_softmax_summed_over_blocks():
    torch.manual_seed(0)
    q, k = torch.randn(300, 8), torch.randn(300, 8)
    scores = (q @ k.T * 0.4).masked_fill(torch.ones(300, 300).triu(1).bool(), float("-inf"))
    weights = torch.softmax(scores.double(), dim=-1)
    mass = heads.attention_mass(q, k, 0.4, 100, 128, rows=170)
    assert mass.shape == (3, 3)
    for tile in range(3):
        for block in range(3):
            expected = weights[tile * 100 : (tile + 1) * 100, block * 128 : (block + 1) * 128].sum() / 100
            assert mass[tile, block] == pytest.approx(expected.item(), abs=1e-5)


def test_heads_of_each_kind_are_told_apart():
    n = 40
    visible = np.tril(np.ones((n, n), bool))
    forced = visible & ~np.tril(np.ones((n, n), bool), -3)
    local, broad, columns, scattered = forced.copy(), visible.copy(), forced.copy(), forced.copy()
    columns[:, [3, 9, 17]] = visible[:, [3, 9, 17]]
    scattered |= visible & (np.random.default_rng(0).random((n, n)) < 0.2)
    hard = forced | (visible & (np.random.default_rng(1).random((n, n)) < 0.6))
    masks = {(5, 0): scattered, (5, 1): columns, (7, 0): broad, (7, 1): local, (7, 2): hard}
    recall = {(7, 2): 0.7}
    candidates = [
        heads.Candidate(*place, kept, recall.get(place, 0.98), 0.9 if kept is local else 0.3)
        for place, kept in masks.items()
    ]
    chosen = heads.choose(candidates, forced, visible)
    assert chosen == [
        (7, 1, "local"),
        (5, 1, "columns"),
        (5, 0, "scattered"),
        (7, 0, "broad"),
        (7, 2, "hardest"),
    ]
    assert heads.choose(candidates[:2], forced, visible) and heads.choose([], forced, visible) == []


def test_agreement_of_known_distributions():
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    q = torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log()
    kl, same = measure.agreement(p, q)
    assert kl == pytest.approx(0.5 * (0.9 * np.log(9) + 0.1 * np.log(1 / 9)), rel=1e-5)
    assert same == 0.5


def test_share_of_others():
    """A process of its own works beside this one, which sleeps; then this one works."""
    command = [sys.executable, "-c", "import time\nwhile time.process_time() < .5: pass"]
    before = machine.cpu_seconds()
    subprocess.run(command, check=True)
    assert machine.share_of_others(before) > 0.8
    before, end = machine.cpu_seconds(), time.process_time() + 0.5
    while time.process_time() < end:
        pass
    assert 0 <= machine.share_of_others(before) < 1


def test_a_busy_machine_is_told(monkeypatch, results):
    monkeypatch.setattr(machine, "usable_cpus", lambda: 4)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (1.0, 9.0, 9.0))
    assert machine.busy() is None
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (6.5, 0.0, 0.0))
    said = machine.busy()
    assert "load 6.5 on 4 CPUs" in said
    returned, out, _ = results
    told = {**returned, "settings": {**returned["settings"], "busy": said}}
    assert f"Careful: {said}" in report.page(told, out)
    assert "Careful" not in report.page({**told, "settings": {**told["settings"], "busy": None}}, out)


def test_a_gpu_that_waits_for_python_is_told(results):
    returned, out, _ = results
    assert returned["settings"]["pace"] is None and all(run["host_share"] is None for run in returned["runs"])
    runs = [{**run, "host_share": share} for run, share in zip(returned["runs"], (0.5, 0.97), strict=False)]
    words = demo.pace(runs)
    assert words.startswith("the GPU waited for Python with Dense, our kernel: ")
    told = {**returned, "settings": {**returned["settings"], "pace": words}}
    assert f"Careful: {words}" in report.page(told, out)
    assert demo.pace(runs[:1]) is None


def test_dtype_follows_the_processor(monkeypatch):
    from flashprefill.apps import machine

    monkeypatch.setattr(machine, "cpu_features", lambda: ["avx2", "avx512f", "avx512_bf16"])
    assert models.resolve_dtype("auto") == "bf16" and models.resolve_dtype("fp32") == "fp32"
    monkeypatch.setattr(machine, "cpu_features", lambda: ["avx2"])
    assert models.resolve_dtype("auto") == "fp32"


@pytest.mark.parametrize("narrower", [1, 20, 400])
def test_times_are_readable_however_narrow_the_bars(narrower, tmp_path):
    """A label stands in its bar only if it fits; all have one unit; none is over another or over a name."""
    bars = [
        ("Dense (PyTorch SDPA)", 0.0, 13.26, 3.1),
        ("FlashPrefill, shared + mean", 0.04 / narrower, 0.92 / narrower, 2.9),
        ("FlashPrefill, pooled", 0.01 / narrower, 0.84 / narrower, 2.7),
    ]
    plots.times(tmp_path / "times.png", bars)
    with plots.plt.rc_context(plots.STYLE):
        figure = plots.times_figure(bars)
    figure.draw_without_rendering()
    (axis,) = figure.axes
    frame = axis.get_window_extent()
    boxes = [text.get_window_extent() for text in axis.texts]
    for text, box in zip(axis.texts, boxes, strict=True):
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1, text.get_text()
        if text.get_gid() == "inside":
            y = round(text.get_position()[1])
            width = axis.transData.transform((sum(bars[y][1:3]), 0))[0] - axis.transData.transform((0, 0))[0]
            assert box.width <= width
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    words = [text.get_text() for text in axis.texts]
    assert "16.4" in words and "13.3" in words and not any("s" in word for word in words)
    ends = [text.get_text() for text in axis.texts if text.get_gid() != "inside"]
    assert len(ends) == 3 and ("(" in ends[1]) == (narrower > 1)
    plots.plt.close(figure)


def test_small_times_are_milliseconds_with_three_digits():
    assert plots.Unit.of(0.0421).write(0.0421) == "42.1" and plots.Unit.of(0.5).write(0.0421) == "42"
    assert plots.Unit.of(16.4).write(0.0021) == "0.002" and plots.Unit.of(16.4).write(0) == "0.0"
