"""Families beside those of the table in docs/transformers.md, made from configs: keep-all equals dense.

None has code of its own in our integration, so these stand for models that nobody has tried yet: norms in
other places, partial rotation, scaled scores, experts, latent attention, layers of other kinds between.
"""

from __future__ import annotations

import pytest

import transformers_models
from transformers_models import (
    EXPERTS,
    KEEP,
    LENGTH,
    MIXED,
    STREAMING,
    TINY,
    fp,
    logits,
    padding,
    tokens,
    torch,
    transformers,
)

patched, quiet = transformers_models.patched, transformers_models.quiet

EXPERT_GROUPS = dict(EXPERTS, n_routed_experts=4, n_group=1, topk_group=1, n_shared_experts=1)
LATENT = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
LATENT.update(EXPERT_GROUPS, head_dim=8, num_key_value_heads=4, first_k_dense_replace=1)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16)
LINEAR.update(EXPERTS, linear_value_head_dim=16, shared_expert_intermediate_size=32, num_hidden_layers=4)
# name: fields, layers that run sparse, why others do not
FAMILIES = {
    "Olmo2": ({}, 2, set()),
    "Granite": ({}, 2, set()),
    "StableLm": (dict(hidden_size=64), 2, set()),
    "SmolLM3": ({}, 2, set()),
    "Nemotron": (dict(hidden_size=64), 2, set()),
    "Mixtral": (EXPERTS, 2, set()),
    "Phi": (dict(num_key_value_heads=4, hidden_size=64), 2, set()),
    "GPTNeoX": (dict(hidden_size=64), 2, set()),
    "Olmo3": (dict(sliding_window=100, layer_types=MIXED), 1, {"sliding window"}),
    "Cohere2": (dict(sliding_window=100, layer_types=MIXED), 1, {"sliding window"}),
    "DeepseekV3": (LATENT, 0, {"value head_dim"}),
    "Qwen3Next": (dict(LINEAR, layer_types=["linear_attention", "full_attention"] * 2), 2, set()),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family, patched):
    fields, sparse, reasons = FAMILIES[family]
    config_class = getattr(transformers, f"{family}Config", None)
    if config_class is None:
        pytest.skip(f"this Transformers has no {family}")
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**{**TINY, **fields})).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids, mask = tokens(2), padding([LENGTH, 170], "left")

    def run():
        with torch.no_grad():
            generated = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        return logits(model, ids), logits(model, ids, attention_mask=mask)[mask.bool()], generated

    wanted = run()
    patched(model, KEEP)
    with fp.collect_stats(model) as stats:
        got = run()
    assert stats.sparse_calls == 3 * sparse and reasons <= set(stats.fallbacks) <= reasons | {"decode"}
    torch.testing.assert_close(got[0], wanted[0], atol=3e-4, rtol=1e-4)
    torch.testing.assert_close(got[1], wanted[1], atol=3e-4, rtol=1e-4)
    assert torch.equal(got[2], wanted[2])
    patched(model, STREAMING)
    assert torch.equal(logits(model, ids), wanted[0]) == (sparse == 0)
    fp.unpatch_model(model)
    assert torch.equal(logits(model, ids), wanted[0])
