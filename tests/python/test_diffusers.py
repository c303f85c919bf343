"""flashprefill.diffusers: the backend in diffusers' registry, inside tiny random models and a pipeline."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers  # noqa: E402
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn  # noqa: E402

import flashprefill as fp  # noqa: E402
import flashprefill.diffusers as fd  # noqa: E402

SPARSE = fp.XAttention(threshold=0.3, norm=0.05)


@pytest.fixture
def transformer() -> Any:
    """A transformer for images, of a text's and an image's tokens together."""
    torch.manual_seed(1)
    sizes = {"attention_head_dim": 32, "num_attention_heads": 2, "axes_dims_rope": [8, 12, 12]}
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        **sizes,
    )
    return model.eval().requires_grad_(False)


def inputs_of(side: int = 24, text: int = 20) -> dict[str, Any]:
    """An image of side x side latent tokens."""
    torch.manual_seed(2)
    places = torch.cartesian_prod(torch.zeros(1), *[torch.arange(side * 1.0)] * 2)
    return {
        "hidden_states": torch.randn(1, side * side, 16),
        "encoder_hidden_states": torch.randn(1, text, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": places,
        "txt_ids": torch.zeros(text, 3),
    }


def run(model: Any, **changed: Any) -> torch.Tensor:
    return model(**{**inputs_of(), **changed}, return_dict=False)[0]


@pytest.mark.parametrize("keep_all", ["xattention(threshold=1)", "spargeattn(cdf=1)", "dense"])
def test_everything_kept_is_the_stock_model(transformer: Any, keep_all: str) -> None:
    stock = run(transformer)
    assert fd.patch_model(transformer, keep_all) is transformer
    with fd.record_stats() as calls:
        result = run(transformer)
    assert len(calls) == 3 and {(call.rows, call.keys, call.reason) for call in calls} == {(596, 596, "")}
    assert all(call.density == 1 for call in calls)
    torch.testing.assert_close(result, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", [SPARSE, fp.SpargeAttn(topk=0.4)])
def test_a_sparse_model_is_the_attention_of_the_operator(transformer: Any, policy: fp.Policy) -> None:
    stock = run(transformer)
    fd.patch_model(transformer, policy)
    with fd.record_stats() as calls:
        sparse = run(transformer)
    assert all(call.density < 1 for call in calls)
    assert not torch.equal(sparse, stock)
    fd.unpatch_model(transformer)
    assert torch.equal(run(transformer), stock)

    member = fd._member_of(policy)
    q, k, v = torch.randn(3, 2, 500, 4, 32)
    through = dispatch_attention_fn(q, k, v, scale=0.3, backend=member)
    direct = fp.prefill_attention(q, k, v, policy, causal=False, softmax_scale=0.3)
    assert torch.equal(through, direct)


def test_two_models_have_two_policies_and_a_copy_keeps_its_own(transformer: Any) -> None:
    stock, twin = run(transformer), copy.deepcopy(transformer)
    fd.patch_model(transformer, SPARSE)
    child = copy.deepcopy(transformer)
    assert torch.equal(run(twin), stock)
    sparse = run(transformer)
    fd.patch_model(transformer, "dense")
    torch.testing.assert_close(run(transformer), stock, rtol=1e-4, atol=1e-5)
    assert torch.equal(run(child), sparse)
    assert not any(name.startswith("flashprefill") for name in AttentionBackendName.__members__)


def test_the_engines_own_switch_undoes_it(transformer: Any) -> None:
    stock = run(transformer)
    fd.patch_model(transformer, SPARSE)
    transformer.reset_attention_backend()
    assert torch.equal(run(transformer), stock)


@pytest.mark.parametrize(
    ("reason", "changed"),
    [
        ("mask", {"attn_mask": torch.ones(200, 200, dtype=torch.bool)}),
        ("short", {"query": torch.randn(1, 100, 2, 32)}),
        ("causal", {"query": torch.randn(1, 150, 2, 32), "is_causal": True}),
        ("gradients", {"query": torch.randn(1, 200, 2, 32, requires_grad=True)}),
    ],
)
def test_what_the_kernel_does_not_take_is_dense(reason: str, changed: dict[str, Any]) -> None:
    fd._warned.clear()
    q, k, v = torch.randn(3, 1, 200, 2, 32)
    call = {"query": q, "key": k, "value": v, **changed}
    loud = reason != "short"
    with warnings.catch_warnings(record=True) as said, fd.record_stats() as calls:
        warnings.simplefilter("always")
        for _ in range(2):
            result = dispatch_attention_fn(**call, backend=fd._member_of(SPARSE))
    assert [call.reason for call in calls] == [reason] * 2
    assert len([line for line in said if "flashprefill" in str(line.message)]) == loud
    expected = dispatch_attention_fn(**call, backend=AttentionBackendName.NATIVE)
    assert torch.equal(result, expected)


def test_causal_attention_of_equal_lengths_is_sparse() -> None:
    q, k, v = torch.randn(3, 1, 700, 2, 32)
    result = dispatch_attention_fn(q, k, v, is_causal=True, backend=fd._member_of(SPARSE))
    assert torch.equal(result, fp.prefill_attention(q, k, v, SPARSE))


def test_refusals(transformer: Any) -> None:
    with pytest.raises(fp.InvalidArgumentError, match="must be 1 for flashprefill"):
        fd.patch_model(transformer, "flashprefill")
    with pytest.raises(fp.ArgumentTypeError, match="pipe.transformer"):
        fd.patch_model(object(), SPARSE)
    with pytest.raises(fp.InvalidArgumentError, match="attention backends"):
        fd.patch_model(torch.nn.Linear(2, 2), SPARSE)
    with pytest.raises(fp.InvalidArgumentError, match="not patched"):
        fd.unpatch_model(transformer)


def test_a_compiled_model_gives_the_same(transformer: Any) -> None:
    fd.patch_model(transformer, SPARSE)
    expected = run(transformer)
    torch.testing.assert_close(run(torch.compile(transformer, backend="eager")), expected)


def test_a_pipeline_with_its_first_steps_dense(transformer: Any) -> None:
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.1,
        scaling_factor=0.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    pipe = diffusers.FluxPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
    )
    pipe.set_progress_bar_config(disable=True)

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            fd.patch_model(pipe.transformer, SPARSE)
        return tensors

    def image() -> torch.Tensor:
        text = inputs_of()
        return pipe(
            prompt_embeds=text["encoder_hidden_states"],
            pooled_prompt_embeds=text["pooled_projections"],
            height=96,
            width=96,
            num_inference_steps=3,
            output_type="pt",
            generator=torch.manual_seed(3),
            callback_on_step_end=after_step,
        ).images

    with fd.record_stats() as calls:
        first = image()
    assert len(calls) == 2 * 3 and all(call.density < 1 for call in calls)
    fd.unpatch_model(transformer)
    assert torch.equal(image(), first) and first.isfinite().all()
