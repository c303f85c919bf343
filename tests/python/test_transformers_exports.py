"""Patched models as torch.export, ONNX (both ways) and AOTInductor write them, run at other lengths too."""

from __future__ import annotations

import shutil
import warnings

import pytest

import transformers_models
from transformers_models import LENGTH, STREAMING, fp, make, padding, tokens, torch

patched, quiet = transformers_models.patched, transformers_models.quiet
LENGTHS = (40, 127, 128, LENGTH + 33)  # below and above a query tile


class Wrapped(torch.nn.Module):
    def __init__(self, model, masked):
        super().__init__()
        self.model, self.masked = model, masked

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask if self.masked else None, use_cache=False).logits


def example(length=LENGTH):
    return tokens(2, length), padding([length, length - 20], "left", length)


def dynamic(least=2):
    axes = {0: torch.export.Dim("batch", min=2, max=8), 1: torch.export.Dim("length", min=least, max=1024)}
    return axes, axes


def check_at_all_lengths(run, model, masked, tolerance):
    """Compare with the model's own dense attention; the model is unpatched for that."""
    fp.unpatch_model(model)
    for length in LENGTHS:
        ids, mask = tokens(2, length, seed=5), padding([length, length - 9], "left", length)
        with torch.no_grad():
            wanted = Wrapped(model, masked)(ids, mask)
        rows = mask.bool() if masked else torch.ones_like(mask).bool()
        torch.testing.assert_close(run(ids, mask)[rows], wanted[rows], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("exported_at", [100, LENGTH])
def test_torch_export_with_dynamic_lengths_is_dense(exported_at, masked, patched):
    model = patched(make("llama"), STREAMING)
    with torch.no_grad():
        program = torch.export.export(
            Wrapped(model, masked), example(exported_at), strict=False, dynamic_shapes=dynamic()
        )
    assert "flashprefill" not in str(program.graph)
    check_at_all_lengths(program.module(), model, masked, 1e-5)


def test_torch_export_with_one_length_is_dense(patched):
    """Transformers hands on a mask while torch.export traces, and its values are not known then."""
    model = patched(make("llama"), STREAMING)
    ids, mask = example()
    with torch.no_grad():
        program = torch.export.export(Wrapped(model, False), (ids, mask), strict=False)
        got = program.module()(ids, mask)
        fp.unpatch_model(model)
        wanted = Wrapped(model, False)(ids, mask)
    assert "flashprefill" not in str(program.graph)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


# The older exporter knows no aten::diff, by which Transformers looks for packed sequences without a mask.
@pytest.mark.parametrize(("dynamo", "masked"), [(False, True), (True, False), (True, True)])
def test_onnx_files_are_dense_and_right_at_other_lengths(dynamo, masked, patched, tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, file = patched(make("llama"), STREAMING), str(tmp_path / "model.onnx")
    axes = {0: "batch", 1: "length"}
    names = dict(input_names=["ids", "mask"], output_names=["logits"])
    if dynamo:
        how = dict(dynamic_shapes=dynamic(), verbose=False)
    else:
        how = dict(dynamic_axes={"ids": axes, "mask": axes, "logits": axes})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Wrapped(model, masked), example(), file, dynamo=dynamo, **names, **how)
    onnx.checker.check_model(file)
    assert {node.domain for node in onnx.load(file).graph.node} == {""}
    session = runtime.InferenceSession(file)

    def run(ids, mask):
        given = {"ids": ids.numpy(), "mask": mask.numpy()}
        inputs = {
            each.name: given[each.name] for each in session.get_inputs()
        }  # a mask that is not read is none
        return torch.from_numpy(session.run(None, inputs)[0])

    check_at_all_lengths(run, model, masked, 1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="AOTInductor calls a C++ compiler")
def test_aot_inductor_packages(patched, tmp_path):
    model = patched(make("llama"), STREAMING)
    ids, mask = example()
    with torch.no_grad():
        program = torch.export.export(Wrapped(model, False), (ids, mask), strict=False)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        got = torch._inductor.aoti_load_package(path)(ids, mask)
        fp.unpatch_model(model)
        wanted = Wrapped(model, False)(ids, mask)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
