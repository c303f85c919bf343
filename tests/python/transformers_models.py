"""Models for the tests of the Transformers integration: tiny and random, made from configs, one of each kind.

Importing this skips the test module where torch or Transformers 5 is missing.
"""

from __future__ import annotations

import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5")

import flashprefill as fp  # noqa: E402
from flashprefill.apps.measure import cache_keyword  # noqa: E402
from flashprefill.transformers import attention, fallback, masks  # noqa: E402, F401

LENGTH = 300  # three query tiles, the last one ragged, and no multiple of a block
KEEP = fp.FlashPrefill(alpha=0.0, block_size=16, sink_blocks=1, window_blocks=1, dense_tail_blocks=1)
BEST = fp.FlashPrefill(alpha=1.0, block_size=16, sink_blocks=1, window_blocks=2, dense_tail_blocks=2)
SHARED = fp.FlashPrefill(alpha=1.0, block_size=32, sink_blocks=1, window_blocks=1, share_heads=True)
STREAMING = fp.Streaming(sink_blocks=1, window_blocks=2, dense_tail_blocks=0, block_size=16)

TINY = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    initializer_range=0.2,  # so that attention is not flat
)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
SECTIONS = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]))
MIXED = ["sliding_attention", "full_attention"]
# name: config class, its fields, why layers of it run dense
MODELS = {
    "llama": ("LlamaConfig", {}, set()),
    "qwen2": ("Qwen2Config", {}, set()),
    "qwen3": ("Qwen3Config", {}, set()),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS, set()),
    "mistral": ("MistralConfig", dict(sliding_window=None), set()),
    "mistral_wide": ("MistralConfig", dict(sliding_window=2048), set()),
    "mistral_window": ("MistralConfig", dict(sliding_window=100), {"sliding window"}),
    # Eager, because SDPA, its default before 5.24, leaves the softcap out.
    "gemma2": (
        "Gemma2Config",
        dict(layer_types=MIXED, sliding_window=100, attn_implementation="eager"),
        {"softcap"},
    ),
    "gemma3": ("Gemma3TextConfig", dict(layer_types=MIXED, sliding_window=100), {"sliding window"}),
    "gpt_oss": ("GptOssConfig", dict(EXPERTS, layer_types=MIXED, sliding_window=100), {"attention sinks"}),
    "gemma": ("GemmaConfig", {}, set()),
    "phi3": ("Phi3Config", dict(sliding_window=None), set()),
    "glm": ("GlmConfig", {}, set()),
    "glm4": ("Glm4Config", {}, set()),
    # The layers that see chunks alone; a fourth layer in four sees everything.
    "llama4": (
        "Llama4TextConfig",
        dict(
            num_local_experts=2,
            num_experts_per_tok=1,
            intermediate_size_mlp=64,
            moe_layers=[],
            layer_types=["chunked_attention", "full_attention"],
            no_rope_layers=[1, 0],
            attention_chunk_size=100,
        ),
        {"custom mask"},
    ),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", dict(SECTIONS, hidden_size=64), set()),
    "qwen3_vl": ("Qwen3VLConfig", SECTIONS, set()),
    "qwen3_vl_moe": ("Qwen3VLMoeConfig", {**SECTIONS, **EXPERTS}, set()),
}
# Models that see: the fields above are their language models'.
TOWER = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=48)
DEEP = dict(TOWER, num_position_embeddings=16, deepstack_visual_indexes=[0])
VISION = {
    "qwen2_5_vl": dict(TOWER, out_hidden_size=64, fullatt_block_indexes=[0]),
    "qwen3_vl": DEEP,
    "qwen3_vl_moe": DEEP,
}
CACHE = cache_keyword(transformers.LlamaForCausalLM)  # cache or, before 5.24, past_key_values
PADDED_DENSE = ("llama4",)  # its files don't support FlashAttention, so its masks are SDPA's
ALL_DENSE = ("mistral_window", "gemma2", "gpt_oss")


def make(name: str, **fields):
    config_class, extra, _ = MODELS[name]
    kind, fields = transformers.AutoModelForCausalLM, {**TINY, **extra, **fields}
    if name in VISION:
        kind, fields = (
            transformers.AutoModelForImageTextToText,
            dict(text_config=fields, vision_config=VISION[name]),
        )
    config = getattr(transformers, config_class)(**fields)
    torch.manual_seed(len(name))
    model = kind.from_config(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(name):
        if name not in made:
            made[name] = make(name)
        return made[name]

    return get


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Start each test with nothing warned about, and let fallbacks warn unless the test looks."""
    monkeypatch.setattr(fallback, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fp.transformers.FlashPrefillWarning)
        yield


@pytest.fixture
def patched():
    """patch_model for the length of a test."""
    seen = []

    def patch(model, *args, **options):
        fp.patch_model(model, *args, **options)
        if model not in seen:
            seen.append(model)
        return model

    yield patch
    for model in seen:
        if hasattr(model, "_flashprefill_before"):
            fp.unpatch_model(model)


def tokens(batch=1, length=LENGTH, seed=0):
    return torch.randint(2, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(lengths, side, length=LENGTH):
    mask = torch.zeros(len(lengths), length, dtype=torch.long)
    for row, n in zip(mask, lengths, strict=True):
        row[slice(length - n, None) if side == "left" else slice(n)] = 1
    return mask


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def check_reasons(stats, name, sparse=True):
    expected = MODELS[name][2]
    assert expected <= set(stats.fallbacks) <= expected | {"short", "decode"}
    assert (stats.sparse_calls > 0) == (sparse and name not in ALL_DENSE)


def generated_in_batches(model, prompts):
    """What continuous batching generates: three tokens for each prompt, [prompts][3].

    Its cache would take nine tenths of the machine's free memory if it were not told how many pages to have.
    """
    settings = transformers.GenerationConfig(
        max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    batching = transformers.ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=2048)
    outputs = model.generate_batch(
        prompts, generation_config=settings, continuous_batching_config=batching, progress_bar=False
    )
    return [output.generated_tokens for output in outputs.values()]
