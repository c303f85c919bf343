"""`--device`: what it takes, what it says where there is no GPU to use, and clocks, on the CPU."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch")

import flashprefill as fp  # noqa: E402
from flashprefill import cli  # noqa: E402
from flashprefill.apps import device, machine, models, table  # noqa: E402
from flashprefill.apps.errors import UsageError  # noqa: E402


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(device, "torch_lacks", lambda: "PyTorch finds none")


@pytest.mark.parametrize("verb", ["demo", "try", "lab", "bench"])
def test_every_verb_that_computes_takes_a_device(verb):
    parser = cli.make_parser()
    assert parser.parse_args([verb]).device == "auto"
    assert parser.parse_args([verb, "--device", "cuda"]).device == "cuda"
    with pytest.raises(SystemExit):
        parser.parse_args([verb, "--device", "tpu"])


@pytest.mark.parametrize("verb", ["demo", "try", "lab", "bench"])
def test_cuda_without_a_gpu_is_one_line_that_says_what_is_missing(verb, no_gpu, capsys, monkeypatch):
    if verb != "bench":
        pytest.importorskip("transformers")
        pytest.importorskip("matplotlib")
        if not machine.importable(models.BUNDLED_PACKAGE):
            pytest.skip("needs the demo's model")
        monkeypatch.setattr("flashprefill.apps.models.resolve_path", lambda path: pytest.fail("too late"))
    if verb == "demo":
        monkeypatch.setattr("flashprefill.apps.demo.check", lambda options: None)
    assert cli.main([verb, "--device", "cuda"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == "flashprefill: --device cuda: PyTorch finds none"


def test_auto_is_the_cpu_without_a_gpu(no_gpu):
    assert device.resolve("auto") == device.resolve("cpu") == device.CPU
    assert device.CPU.kind == "cpu" and not device.CPU.cuda and device.CPU.facts() is None
    assert device.CPU.sdpa_backend(4, 2, 64, 128, torch.float32) is None
    assert "threads on" in device.CPU.describe(3)


def test_a_gpu_needs_our_backend_too(monkeypatch):
    monkeypatch.setattr(device, "torch_lacks", lambda: None)
    monkeypatch.setattr(device, "backends", lambda: [fp.Backend("cpu", True, "", ())])
    with pytest.raises(UsageError, match="built without CUDA"):
        device.resolve("cuda")
    assert device.resolve("auto").kind == "cpu"
    old = fp.Backend("cuda", False, "GeForce (sm_61: not supported)", ())
    monkeypatch.setattr(device, "backends", lambda: [old])
    with pytest.raises(UsageError, match="can't run here: GeForce"):
        device.resolve("cuda")
    monkeypatch.setattr(device, "backends", lambda: [fp.Backend("cuda", True, "H100", ())])
    assert device.resolve("auto").kind == device.resolve("cuda").kind == "cuda"
    assert device.resolve("auto", "fp32").kind == "cpu" and device.resolve("auto", "fp16").kind == "cuda"


def test_what_pytorch_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in device.torch_lacks()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert device.torch_lacks() == "PyTorch has CUDA 13.0 but finds no usable device or driver"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.torch_lacks() is None


def test_dtypes_of_a_gpu():
    pytest.importorskip("transformers")
    from flashprefill.apps import models

    gpu = device.Device("cuda")
    assert models.resolve_dtype("auto", gpu) == "bf16" and models.resolve_dtype("fp16", gpu) == "fp16"
    with pytest.raises(UsageError, match="--dtype fp32: the CUDA kernels compute in bf16 and fp16"):
        models.resolve_dtype("fp32", gpu)


def test_a_backend_or_target_names_the_device(monkeypatch):
    pytest.importorskip("tqdm")
    from flashprefill.apps import bench

    monkeypatch.setattr(device, "lacks", lambda: None)
    assert bench.device_for(bench.Options()).kind == "cuda"
    assert bench.device_for(bench.Options(backend="cuda")).kind == "cuda"
    assert bench.device_for(bench.Options(backend="reference")).kind == "cpu"
    assert bench.device_for(bench.Options(target="avx2")).kind == "cpu"
    monkeypatch.setattr(bench, "backends", lambda: [fp.Backend("cuda", True, "H100", ("sm90a", "portable"))])
    assert bench.device_for(bench.Options(target="portable")).kind == "cuda"
    assert bench.device_for(bench.Options(target="avx2")).kind == "cpu"


def test_spans_and_timed_calls():
    with device.CPU.span() as span:
        time.sleep(0.01)
    assert 0.01 <= span.seconds < 1
    result, seconds = device.CPU.timed(lambda: "done")
    assert result == "done" and 0 <= seconds < 0.1
    x = torch.randn(512, 2, 32)
    whole, selecting = device.CPU.timed_policy(
        lambda: fp.prefill_attention(x, x, x, fp.FlashPrefill()), lambda: pytest.fail("not on the CPU")
    )
    assert 0 < selecting < whole
    assert device.Device("cpu", lambda: 7.0).now() == 7.0


def test_seconds_are_printed_with_what_matters():
    assert [table.seconds(x) for x in (12.3456, 1.0, 0.03126)] == ["12.35", "1.00", "0.0313"]


def test_where_a_run_computed():
    facts = machine.describe({"name": "NVIDIA H200"})
    facts["settings"] = {"threads": 3}
    assert machine.computed_on(facts) == "NVIDIA H200"
    facts = {**machine.describe(), "settings": {"threads": 3}}
    assert "gpu" not in facts["machine"] and machine.computed_on(facts).endswith(", 3 threads")


def test_masks_move():
    mask = fp.select(torch.randn(700, 4, 16), torch.randn(700, 2, 16), fp.FlashPrefill())
    moved = mask.to("cpu")
    assert torch.equal(moved.dense(), mask.dense()) and moved.density == mask.density
    assert repr(moved) == repr(mask)
    meta = mask.to("meta")
    assert meta.bits.device.type == meta.counts.device.type == "meta" and meta.vertical_slash is None


def test_a_model_under_another_rotary_base(tmp_path):
    pytest.importorskip("transformers")
    import demo_model
    from flashprefill.apps import models

    folder = demo_model.save(tmp_path / "model")
    plain, asked = models.load(folder, "fp32"), models.load(folder, "fp32", stretch=4.0)
    made = models.stretched(plain, 4.0)
    ids = torch.arange(2, 200)[None]
    with torch.inference_mode():
        first, same, other = (one.model(ids).logits for one in (asked, made, plain))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert made.context == plain.context == 4096 and models.stretched(made, 4.0) is made
    assert made.model.config.max_position_embeddings == 16384
    back = models.stretched(made, 1.0)
    with torch.inference_mode():
        assert torch.equal(back.model(ids).logits, other)
