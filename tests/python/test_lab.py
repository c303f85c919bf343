"""The lab and `try` on a model of a few thousand weights: figures by their definitions, files, refusals."""

from __future__ import annotations

import base64
import csv
import json
import re
import zlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import flashprefill as fp  # noqa: E402
from flashprefill import cli  # noqa: E402
from flashprefill.apps import factors, heads, measure, needles  # noqa: E402
from flashprefill.apps.errors import UsageError  # noqa: E402
from flashprefill.apps.lab import baselines, draw, figures, lines, page, run  # noqa: E402
from flashprefill.policies.text import named  # noqa: E402

TOKENS, Q_HEADS, KV_HEADS, DIM, SCALE = 700, 4, 2, 16, 0.5


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(1)
    q, k, v = (torch.randn(TOKENS, h, DIM) for h in (Q_HEADS, KV_HEADS, KV_HEADS))
    return figures.Layer.of(3, measure.Captured(q, k, v, SCALE))


def weights_of(layer, head):
    scores = layer.query[:, head].double() @ layer.key[:, head // 2].double().T * SCALE
    return torch.softmax(scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), float("-inf")), dim=-1)


@pytest.fixture(scope="module")
def results(model, tmp_path_factory):
    """One quick run of the whole lab: (results, folder)."""
    out = tmp_path_factory.mktemp("lab")
    options = run.Options(model=model, quick=True, tokens=1536, out=out, dtype="fp32", dump=out / "dumps")
    return run.run(options), out


# ---------------------------------------------------------------- figures


def test_figures_are_their_definitions(layer):
    keep = torch.rand(Q_HEADS, 6, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    keep |= torch.eye(6, dtype=torch.bool)
    mask = fp.BlockMask.from_dense(keep, q_len=TOKENS, k_len=TOKENS)
    sums = figures.Sums()
    sums.add(layer, mask)
    density = float(mask.density)
    recalls, errors = [], []
    for head in range(Q_HEADS):
        weights = weights_of(layer, head)
        value = layer.value[:, head // 2].double()
        kept = keep[head].repeat_interleave(128, 0)[:TOKENS].repeat_interleave(128, 1)[:, :TOKENS]
        ours = weights * kept
        out = (ours / ours.sum(1, keepdim=True)) @ value
        for tile in range(6):
            rows = slice(tile * 128, min(tile * 128 + 128, TOKENS))
            recalls.append(ours[rows].sum(1).mean())
            exact = weights[rows] @ value
            errors.append((out[rows] - exact).norm() / exact.norm())
    made = sums.figures()
    assert made["density"] == pytest.approx(density, abs=1e-4)
    assert made["recall"] == pytest.approx(float(torch.stack(recalls).mean()), abs=1e-4)
    assert made["recall_p5"] == pytest.approx(float(torch.quantile(torch.stack(recalls), 0.05)), abs=1e-4)
    assert made["error"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-3)
    assert 0 < made["error_corrected"] < made["error"]  # independent keys: their mean says a lot


def test_everything_kept_loses_nothing(layer):
    sums = figures.Sums()
    sums.add(layer, fp.select(layer.query, layer.key, fp.Dense()))
    made = sums.figures()
    assert made["density"] == made["recall"] == made["recall_p5"] == 1
    assert made["error"] == made["error_corrected"] == 0


def test_masses_are_the_softmax_by_block(layer):
    for head in (0, 3):
        weights = torch.nn.functional.pad(weights_of(layer, head), (0, 768 - TOKENS))
        by_block = weights.view(TOKENS, 6, 128).sum(2)
        expected = torch.stack([by_block[t * 128 : t * 128 + 128].mean(0) for t in range(6)])
        assert torch.allclose(layer.mass[head].double(), expected, atol=1e-5)


def test_shared_masks_count_for_every_head(layer):
    sums = figures.Sums()
    mask = fp.select(layer.query, layer.key, fp.Streaming(1, 1, 0, share_heads=True), softmax_scale=SCALE)
    sums.add(layer, mask)
    assert len(sums.density[0]) == Q_HEADS and len(sums.recall[0]) == 6 * Q_HEADS


def test_a_curve_is_read_between_its_points():
    points = [
        {"density": d, **dict.fromkeys(figures.CURVES, v)} for d, v in ((0.4, 8.0), (0.1, 2.0), (0.2, 4.0))
    ]
    assert figures.at_density(points, 0.15)["recall"] == 3.1699  # 2 + 2 log2(1.5)
    assert figures.at_density(points, 0.4)["error"] == 8.0
    assert figures.at_density(points, 0.05) is None and figures.at_density(points[:1], 0.3) is None


# ---------------------------------------------------------------- baselines


def test_bounds_bound_every_score_of_a_block(layer):
    energy = baselines.bounds(layer)
    pooled = layer.query[:, 1].float()[:640].view(-1, 16, DIM).mean(1)  # whole tiles
    keys = layer.key[:, 0].float()[:640].view(5, 128, DIM)
    low, high = keys.amin(1), keys.amax(1)
    box = torch.maximum(pooled[:, None] * low, pooled[:, None] * high).sum(-1)
    assert (box[:, :, None] + 1e-4 >= torch.einsum("rd,bkd->rbk", pooled, keys)).all()
    sees = (torch.arange(40)[:, None] * 16 + 15) >= torch.arange(5) * 128 + 127
    share = torch.softmax((box * SCALE).masked_fill(~sees, float("-inf")), -1).nan_to_num()
    expected = share.view(5, 8, 5).sum(1)
    assert torch.allclose(energy[1, :5, :5], expected, atol=1e-5)


def test_rules():
    energy = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]])
    assert baselines.by_alpha(energy, 0.5).tolist() == [[[True, True, False, False]]]
    assert baselines.by_share(energy, 0.1).tolist() == [[[True, True, True, False]]]
    assert baselines.by_blocks(energy, 1).tolist() == [[[True, False, False, False]]]
    assert not baselines.by_share(torch.zeros(1, 1, 4), 0.0).any()


def test_share_of_the_oracle_is_the_best_mean_recall(layer):
    shared = baselines.by_share(layer.mass, 0.05)
    alpha = layer.mass / layer.mass.amax(-1, keepdim=True)
    same = alpha.flatten().topk(int(shared.sum())).values[-1]
    relative = alpha >= same
    assert (layer.mass * shared).sum() >= (layer.mass * relative).sum()


# ---------------------------------------------------------------- the table


def test_the_table_is_sound():
    lines.check()
    assert {line.method for line in lines.methods()} >= (set(named()) - {"dense", "vsprefill"})
    assert len({line.label for line in lines.methods()}) == len(lines.methods())


def test_a_line_may_be_asked_for_by_its_label():
    assert [line.label for line in lines.methods(["Gather, gain", "streaming"])] == [
        "Gather, gain",
        "Streaming",
    ]
    assert not lines.studies(["Gather, gain"])


def test_a_policy_without_a_line_shows_up(monkeypatch):
    monkeypatch.setattr(lines, "METHODS", tuple(line for line in lines.METHODS if line.method != "sketch"))
    found = [line for line in lines.methods() if line.method == "sketch"]
    assert len(found) == 1 and found[0].values == () and found[0].policy(None, run.FORCED).sink_blocks == 1
    assert [c.points[0].value for c in run.Sweeps(False).curves(found)] == [None]


def test_a_line_for_a_policy_that_is_not_there_is_left_out(monkeypatch):
    monkeypatch.setattr(lines, "METHODS", (*lines.METHODS, lines.Line("Later", "later", "gamma", (0.9,))))
    assert not any(line.method == "later" for line in lines.methods())
    lines.check()


def test_what_no_backend_selects_for_is_left_out(layer, monkeypatch):
    real = run.select

    def select(query, key, policy, **kw):
        if policy.kind == "sketch":
            raise fp.UnsupportedError("not here")
        return real(query, key, policy, **kw)

    monkeypatch.setattr(run, "select", select)
    captured = measure.Captured(layer.query, layer.key, layer.value, SCALE)
    reasons = run.refused(run.Options(method=["sketch", "flashprefill", "oracle"]), captured)
    assert reasons == {"sketch": "not here"}
    with pytest.raises(UsageError, match="nothing is left to look at: not here"):
        run.one_text(run.Source("mine", "", TOKENS, {3: captured}), run.Options(method=["sketch"]))


def test_forced_blocks_are_the_same_for_all():
    """But for a line that says its own in its fields."""
    for line in lines.methods():
        if not line.scorer and line.parameter not in run.FORCED:
            policy = line.policy(line.values[0] if line.values else None, run.FORCED)
            for name, count in run.FORCED.items():
                assert getattr(policy, name, count) == line.fixed.get(name, count)


def test_a_sweep_that_two_lines_ask_for_is_made_once():
    sweeps = run.Sweeps(quick=False)
    one = sweeps.curves(lines.methods(["flashprefill"]))
    before = sweeps.steps()
    two = sweeps.curves(lines.studies(["flashprefill"])["alpha"][1])
    assert sweeps.steps() == before and two[0].points is one[0].points


# ---------------------------------------------------------------- the whole lab


def test_results_hold_every_method(results):
    returned, out = results
    saved = json.loads((out / "results.json").read_text())
    assert saved == json.loads(json.dumps(returned)) and saved["schema"] == "flashprefill-lab/1"
    assert saved["machine"]["cpu"] and saved["command"] and saved["seconds"] > 0
    (text,) = saved["texts"]
    assert (text["name"], text["tokens"], text["q_heads"], text["kv_heads"]) == ("gpl", 1536, 4, 2)
    assert len(text["layers"]) == 2
    here = [line.label for line in lines.methods() if line.method not in text["left_out"]]
    assert [curve["label"] for curve in text["methods"]] == here
    assert not set(text["left_out"]) & {"flashprefill", "sketch", "streaming"}
    assert set(text["studies"]) == set(lines.studies())
    for curve in text["methods"] + [c for study in text["studies"].values() for c in study["curves"]]:
        assert np.array(curve["density_by_layer_and_head"]).shape == (2, 4)
        for point in curve["points"]:
            assert 0 < point["density"] <= 1 and 0 < point["recall_p5"] <= 1
            assert 0 < point["recall"] <= 1.0001 and point["error"] >= 0 and point["error_corrected"] >= 0
    labels = [row["label"] for row in text["times"]]
    assert (
        labels[:2] == ["PyTorch SDPA", "Dense"] and "Sketch, mass" in labels and "Oracle, alpha" not in labels
    )
    assert all(row["seconds"] > 0 for row in text["times"])


def test_quick_fills_its_table_and_shows_its_curves(results):
    """At a density that is reached, or each at its nearest; and every curve is a line inside the picture."""
    text = results[0]["texts"][0]
    lines_ = run.render(text).splitlines()[-len(text["methods"]) :]
    assert not any(" - " in line or line.endswith("-") for line in lines_), lines_
    swept = [curve for curve in text["methods"] if curve["parameter"] is not None]
    end = draw.end_of(text["methods"])
    assert all(sum(point["density"] <= end for point in curve["points"]) >= 2 for curve in swept)
    table = page.quality_table(text, text["methods"])
    assert "<td>-</td>" not in table


@pytest.mark.parametrize(
    ("tokens", "density"), [(24355, 0.15), (7600, 0.25), (3072, 0.3), (1536, 0.6), (300, 1.0), (128, 1.0)]
)
def test_the_density_to_compare_at_can_be_reached(tokens, density):
    assert figures.reference_density(tokens, 3) == density


def test_files_are_what_they_say(results):
    returned, out = results
    assert {path.name for path in out.iterdir() if path.is_file()} == set(returned["files"])
    assert {"gpl-curves.png", "gpl-density.png", "gpl-allocation.png"} <= set(returned["files"])
    with (out / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    text = returned["texts"][0]
    every = text["methods"] + [c for study in text["studies"].values() for c in study["curves"]]
    assert len(rows) == sum(len(curve["points"]) for curve in every)
    assert float(rows[0]["recall"]) == every[0]["points"][0]["recall"]


def test_report_needs_nothing_else_and_holds_the_masks(results):
    returned, out = results
    text = (out / "report.html").read_text()
    assert text.startswith("<!doctype html>") and text.count("<script") == 2
    assert {begin for _, begin in re.findall(r"\b(src|href)\s*=\s*[\"']?(.{5})", text)} == {"data:"}
    assert not any(word in text for word in ("<link", "@import", "url(", "fetch("))
    data = json.loads(re.search(r"id=data>(.*?)</script>", text).group(1))
    (one,) = data
    assert len(one["lines"]) == len(returned["texts"][0]["methods"])
    assert (one["lines"][0]["block"], one["lines"][0]["tile"], one["lines"][0]["group"]) == (128, 128, 1)
    layer = next(iter(one["mass"]))
    codes = np.frombuffer(zlib.decompress(base64.b64decode(one["mass"][layer])), "<u2").reshape(4, 12, 12)
    mass = np.where(codes > 0, 2.0 ** (-24 * (1 - (codes - 1.0) / 65534)), 0)
    assert np.allclose(mass.sum(-1), 1, atol=1e-3) and (mass[:, 3, 4:] == 0).all()
    bits = np.frombuffer(zlib.decompress(base64.b64decode(one["lines"][0]["bits"][layer])), np.uint8)
    kept = np.unpackbits(bits)[: 4 * 12 * 12].reshape(4, 12, 12)
    assert kept[:, range(12), range(12)].all() and not np.triu(kept[0], 1).any()
    curve = returned["texts"][0]["methods"][0]
    density = np.array(curve["density_by_layer_and_head"])[returned["texts"][0]["layers"].index(int(layer))]
    assert np.allclose(kept.sum((1, 2)) / (12 * 13 / 2), density, atol=1e-3)


def test_codes_of_masses():
    mass = np.array([0.0, 2.0**-30, 2.0**-24, 1e-3, 0.5, 1.0])
    codes = page.logarithms(mass)
    assert codes[0] == 0 and codes[1] == 0 and codes[-1] == 65535
    back = 2.0 ** (-24 * (1 - (codes[3:] - 1.0) / 65534))
    assert np.allclose(back, mass[3:], rtol=1e-3)


def test_from_dumps_and_times_only(results, tmp_path, capsys):
    returned, out = results
    arguments = [
        "lab",
        "--from",
        str(out / "dumps"),
        "--device",
        "cpu",
        "--quick",
        "--no-studies",
        "--out",
        str(tmp_path / "again"),
    ]
    assert cli.main([*arguments, "--method", "flashprefill", "--method", "oracle"]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    (before,), (after,) = returned["texts"], again["texts"]
    assert after["layers"] == before["layers"] and after["studies"] == {}
    by_label = {curve["label"]: curve for curve in before["methods"]}
    for curve in after["methods"]:
        assert curve["method"] in ("flashprefill", "oracle")
        same = by_label[curve["label"]]["points"]
        for name in ("density", "recall", "error_corrected"):
            assert [p[name] for p in curve["points"]] == pytest.approx([p[name] for p in same], abs=1e-5)
    assert cli.main([*arguments, "--times-only"]) == 0
    later = json.loads((tmp_path / "again" / "results.json").read_text())
    assert later["texts"][0]["methods"] == after["methods"]
    assert later["texts"][0]["times"] != after["times"] and later["texts"][0]["times_command"]
    assert "milliseconds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": ["novel"]}, "--text novel: must be one of gpl, code, long"),
        ({"method": ["magic"]}, "--method magic: must be one of oracle, flashprefill"),
        ({"tokens": 10}, "--tokens 10: must be at least 256"),
        ({"layers": [7]}, "--layers 7: must be from 0 to 2"),
        ({"times_only": True}, "--times-only: needs --from"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(model, tmp_path, options, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        run.run(run.Options(model=model, dtype="fp32", out=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_dumps_are_checked(tmp_path):
    q = torch.zeros(300, 2, 16)
    torch.save({"q": q, "k": q}, tmp_path / "mine-layer2.pt")
    with pytest.raises(UsageError, match="must hold q, k and v"):
        run.run(run.Options(source=tmp_path, out=tmp_path / "out"))
    (tmp_path / "mine-layer2.pt").unlink()
    with pytest.raises(UsageError, match="holds no dumps"):
        run.run(run.Options(source=tmp_path, out=tmp_path / "out"))


# ---------------------------------------------------------------- try


def case(method, found, tokens=100):
    return {"method": method, "tokens": tokens, "depth": 0.5, "found": found}


def test_a_policy_fails_only_where_dense_finds():
    dense, other = needles.DENSE, "sketch(mass=0.95)"
    both = [case(dense, True), case(other, True), case(dense, False, 200), case(other, False, 200)]
    assert needles.verdict(both)[0] and "finds 1 of 2" in needles.verdict(both)[1]
    passed, words = needles.verdict([case(dense, True), case(other, False)])
    assert not passed and "missed: sketch(mass=0.95) at 100 tokens, depth 0.5" in words
    passed, words = needles.verdict([case(dense, False), case(other, False)])
    assert passed and "nothing to hold the policies against" in words


def test_try_runs_every_method_on_every_prompt(model, tmp_path, capsys):
    out = tmp_path / "try.json"
    arguments = [
        "try",
        "--model",
        str(model),
        "--tokens",
        "700,5000",
        "--depth",
        "0.2,0.8",
        "--dtype",
        "fp32",
    ]
    assert cli.main([*arguments, "--policy", "streaming(window_blocks=1)", "--out", str(out)]) == 0
    saved = json.loads(out.read_text())
    assert len(saved["cases"]) == 2 * 2 * 3 and saved["model"]["context"] == 4096 and saved["passed"]
    assert {c["rotary_scale"] for c in saved["cases"] if c["tokens"] == 700} == {1.0}
    assert {c["rotary_scale"] for c in saved["cases"] if c["tokens"] == 5000} == {2.0}
    streaming = [c for c in saved["cases"] if c["method"].startswith("streaming")]
    assert all(c["density"] < 1 for c in streaming) and all(c["ttft_seconds"] > 0 for c in saved["cases"])
    printed = capsys.readouterr().out
    assert "dense attention finds 0 of 4 needles" in printed and "answer" in printed
    assert "Dense, our kernel" in printed and printed.count("x kernel x") == 2  # one for each length


def test_try_says_why_nothing_was_left_out():
    cases = [
        {"method": method, "tokens": 1024, "density": 1.0, "attention_seconds": seconds}
        for method, seconds in ((needles.DENSE, 8.0), (factors.OURS, 1.0), ("flashprefill(alpha=0.12)", 1.0))
    ]
    split, why = needles.notes(cases)
    assert split == "1024 tokens: attention 8.0x = 8.0x kernel x 1.0x sparsity, with flashprefill(alpha=0.12)"
    assert why.startswith("1024 tokens, density 1.000 with flashprefill(alpha=0.12): at so short a prompt")
    cases[2]["density"] = 0.9
    assert len(needles.notes(cases)) == 1


def test_the_exit_code_says_that_a_needle_was_missed(model, monkeypatch, capsys):
    def answer(_loaded, policy, text, _guard=None):
        dense = policy is None or policy == fp.Dense()
        words = text.answer if dense else "nothing"
        return {
            "ttft_seconds": 1.0,
            "attention_seconds": 0.5,
            "density": 0.5,
            "found": dense,
            "least_sure_token": 0.5,
            "answer": words,
        }

    monkeypatch.setattr(needles, "answer", answer)
    assert (
        cli.main(["try", "--model", str(model), "--tokens", "700", "--depth", "0.5", "--policy", "sketch"])
        == 1
    )
    assert "missed: sketch(mass=0.95) at 700 tokens, depth 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tokens", "context", "factor"), [(8000, 8192, 1), (8193, 8192, 2), (131072, 8192, 16), (9, None, 1)]
)
def test_how_far_the_rotary_base_is_stretched(tokens, context, factor):
    assert needles.stretch_for(tokens, context) == factor


def test_try_refuses_in_a_line(model):
    with pytest.raises(UsageError, match="--tokens 10: must be from 256"):
        needles.run(needles.Options(model=model, tokens=(10,)))
    with pytest.raises(UsageError, match="--depth 1.5: must be from 0"):
        needles.run(needles.Options(model=model, depths=(1.5,)))
    with pytest.raises(UsageError, match="policy 'magic'"):
        needles.run(needles.Options(model=model, policies=("magic",)))


def test_attention_mass_of_any_tile_is_the_demo_s_too(layer):
    mass = heads.attention_mass(layer.query[:, 0], layer.key[:, 0], SCALE, 42, 64, rows=100)
    assert mass.shape == (17, 11) and torch.allclose(mass.sum(1), torch.ones(17), atol=1e-5)
