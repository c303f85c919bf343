"""The apps on a GPU, with a model of a few thousand weights: each runs, and its figures are the GPU's."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import flashprefill as fp  # noqa: E402
from flashprefill import cli  # noqa: E402
from flashprefill.apps import device, heads, inputs, measure, needles  # noqa: E402
from flashprefill.apps.lab import baselines, figures, lines, run  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device.lacks() is not None, reason=f"needs a GPU: {device.lacks()}"),
]

TOKENS = 5000  # above the 3072 keys up to which the GPU keeps everything


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(1)
    shape = inputs.Shape(4, 2, 64, TOKENS)
    return figures.Layer.of(3, measure.Captured(*inputs.make(shape, torch.bfloat16, device="cuda"), 0.125))


def test_auto_takes_the_gpu():
    gpu = device.resolve("auto")
    assert gpu == device.resolve("cuda") and gpu.cuda and gpu.auto_dtype == "bf16"
    assert torch.cuda.get_device_name() == gpu.facts()["name"] == gpu.describe(1)
    assert "attention" in gpu.sdpa_backend(8, 2, 64, 4096, torch.bfloat16)


def test_a_call_is_timed_without_the_host():
    gpu = device.resolve("cuda")
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():  # whoever is first to ask
        gpu.timed(lambda: None)
    for _ in range(3):
        product, seconds = gpu.timed(lambda: x @ x)
    assert product.shape == x.shape and 5e-5 < seconds < 2e-3  # 137 GFLOP
    _, nothing = gpu.timed(lambda: None)
    assert nothing < 1e-4


def test_demo(model, tmp_path, capsys):
    command = ["demo", "--device", "cuda", "--model", str(model), "--tokens", str(TOKENS), "--repeats", "2"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["machine"]["gpu"]["name"] == torch.cuda.get_device_name() and saved["machine"]["gpu"]["cuda"]
    assert saved["settings"]["device"] == "cuda" and saved["settings"]["sdpa"]
    assert saved["model"]["dtype"] == "bf16"
    dense, *others = saved["runs"]
    sparse = [one for one in others if one["policy"] != "dense"]
    assert dense["density"] == 1 and len(sparse) == len(others) - 1
    assert all(0 < one["density"] < 1 for one in sparse)
    assert all(one["dense_layers"] == {} for one in others)
    for one in saved["runs"]:
        assert 0 < one["attention_seconds"]["median"] < one["ttft_seconds"]["median"]
        assert (one["select_seconds"]["median"] > 0) == (one["policy"] is not None)
        assert one["kl_nats"] is not None and one["kl_nats"] < 1
    assert all(0 < one["host_share"] <= 1 for one in saved["runs"])
    assert "masks.png" in saved["files"] and torch.cuda.get_device_name() in capsys.readouterr().err
    assert torch.cuda.get_device_name() in (tmp_path / "report.html").read_text()


def test_try(model, tmp_path):
    out = tmp_path / "try.json"
    command = ["try", "--device", "cuda", "--model", str(model), "--tokens", f"700,{TOKENS}"]
    assert cli.main([*command, "--depth", "0.5", "--out", str(out)]) == 0
    saved = json.loads(out.read_text())
    assert saved["machine"]["gpu"] and saved["model"]["dtype"] == "bf16"
    assert [case["rotary_scale"] for case in saved["cases"]] == [1.0] * 4 + [2.0] * 4
    long = [case for case in saved["cases"] if case["tokens"] == TOKENS and case["method"] != needles.DENSE]
    assert all(0 < case["density"] <= 1 and case["ttft_seconds"] > 0 for case in long)
    assert sum(case["density"] == 1 for case in long) == 1  # our dense kernel's


def test_bench(tmp_path, capsys):
    out = tmp_path / "bench.json"
    command = ["bench", "--device", "cuda", "--shape", "8/2x64x8K", "--repeats", "2", "--density", "0.2"]
    assert cli.main([*command, "--out", str(out)]) == 0
    saved = json.loads(out.read_text())
    names = [row["name"] for row in saved["rows"]]
    picked = saved["settings"]["sdpa"]["8/2x64x8192"]
    assert names[0] == "PyTorch SDPA" and ("PyTorch SDPA, cuDNN" in names) == (picked != "cudnn attention")
    assert saved["settings"]["clock"] == "events" and saved["settings"]["dtype"] == "bf16"
    for row in saved["rows"]:
        assert 1e-6 < row["seconds"]["min"] < 0.1 and row["gflops"] > 0
    sketch = next(row for row in saved["rows"] if row["name"].lower().startswith("sketch"))
    assert 0 < sketch["select_seconds"] < sketch["seconds"]["median"]
    printed = capsys.readouterr().out
    assert "TFLOP/s" in printed and f"SDPA picks {picked}" in printed
    of_cpus = "flashprefill(mean_correction=summary)"
    assert cli.main(["bench", "--device", "cuda", "--policy", of_cpus, "--shape", "8/2x64x8K"]) == 2
    assert "the CPU has it" in capsys.readouterr().err


def test_lab_has_every_method(model, tmp_path, capsys):
    command = ["lab", "--device", "cuda", "--model", str(model), "--quick", "--tokens", str(TOKENS)]
    out, dumps = tmp_path / "lab", tmp_path / "dumps"
    assert cli.main([*command, "--out", str(out), "--dump", str(dumps)]) == 0
    saved = json.loads((out / "results.json").read_text())
    (text,) = saved["texts"]
    assert saved["machine"]["gpu"] and saved["settings"]["device"] == "cuda"
    assert not text["left_out"]
    assert text["sdpa"] and [curve["label"] for curve in text["methods"]] == [
        one.label for one in lines.methods()
    ]
    for curve in text["methods"]:
        for point in curve["points"]:
            assert 0 < point["density"] <= 1 and 0 < point["recall"] <= 1.0001 and point["error"] >= 0
            # CUDA does not correct lists of keys by means.
            assert (point["error_corrected"] is None) == (curve["method"] in ("gather", "s2o"))
    where = {curve["method"]: curve["selected_on"] for curve in text["methods"]}
    on_device = ("flashprefill", "xattention", "minference", "prism", "spargeattn", "sampleattention")
    assert all(where[name] == "cuda" for name in on_device) and where["oracle"] is None
    by_label = {row["label"]: row for row in text["times"]}
    assert by_label["Prism"]["seconds"] > by_label["Prism"]["select_seconds"] > 0
    assert by_label["Sketch, mass"]["seconds"] > by_label["Sketch, mass"]["select_seconds"] > 0
    capsys.readouterr()
    assert torch.cuda.get_device_name() in (out / "report.html").read_text()
    again = [
        "lab",
        "--from",
        str(dumps),
        "--quick",
        "--no-studies",
        "--method",
        "sketch",
        "--method",
        "prism",
    ]
    on_gpu, on_cpu = tmp_path / "gpu", tmp_path / "cpu"
    assert cli.main([*again, "--device", "cuda", "--out", str(on_gpu)]) == 0
    assert cli.main([*again, "--device", "cpu", "--out", str(on_cpu)]) == 0
    pairs = [
        json.loads((one / "results.json").read_text())["texts"][0]["methods"] for one in (on_gpu, on_cpu)
    ]
    for here, there in zip(*pairs, strict=True):
        for one, other in zip(here["points"], there["points"], strict=True):
            for name in ("density", "recall", "error", "error_corrected"):
                assert one[name] == pytest.approx(other[name], abs=0.01), (here["label"], name)
    assert cli.main([*again, "--times-only", "--device", "cuda", "--out", str(on_gpu)]) == 0


def on_host(layer):
    own = (layer.query.cpu(), layer.key.cpu(), layer.value.cpu())
    return figures.Layer.of(layer.number, measure.Captured(*own, layer.scale))


def test_figures_of_both_devices_agree(layer):
    host = on_host(layer)
    assert torch.allclose(layer.mass.cpu(), host.mass, atol=1e-5)
    assert torch.allclose(baselines.bounds(layer).cpu(), baselines.bounds(host), atol=1e-3)
    mask, selects = layer.select(fp.Prism())
    assert selects == "cuda" and mask.bits.is_cuda
    sums = [figures.Sums(), figures.Sums()]
    sums[0].add(layer, mask)
    sums[1].add(host, mask.to("cpu"))
    here, there = (one.figures() for one in sums)
    for name in ("density", "recall", "recall_p5", "error", "error_corrected"):
        assert here[name] == pytest.approx(there[name], abs=5e-3), name


def test_mass_of_rows(layer):
    rows = torch.tensor([5, 700, TOKENS - 1])
    here, there = (
        heads.row_mass(one.query[:, 1], one.key[:, 0], one.scale, rows.to(one.query.device), 128).cpu()
        for one in (layer, on_host(layer))
    )
    assert torch.allclose(here, there, atol=1e-5)


def test_forced_blocks_are_the_same_on_both(layer):
    policy = lines.forced_policy(run.FORCED)
    there = fp.select(layer.query.cpu(), layer.key.cpu(), policy)
    assert torch.equal(fp.select(layer.query, layer.key, policy).dense().cpu(), there.dense())
