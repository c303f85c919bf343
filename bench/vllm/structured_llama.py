"""A Llama of random weights with structure, for timing: blocks of its prompts differ, so policies choose.

Tokens belong to 64 topics, a prompt is runs of 256 tokens of one topic, and an embedding is half its topic's
and half its own. Matrices have fan-in scale; queries and keys are twice that, so that scores have a standard
deviation of about 4. It is not language: densities say how much is computed, and nothing about quality.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

VOCABULARY, TOPICS, RUN = 32000, 64, 256
LLAMA_3_8B = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
}
SMALL = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 256}


def write_config(folder: Path, layers: int, shape: dict[str, int], longest: int = 262144) -> Path:
    """Write config.json of a Llama with these layers; weights are set later, by `set_weights`."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 128, "rope_theta": 500000.0,
        "num_hidden_layers": layers, "vocab_size": VOCABULARY, "max_position_embeddings": longest,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
        **shape,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def set_weights(model: Any) -> int:
    """Set a loaded model's weights in place; for vLLM's `LLM.apply_model`. Returns the number of tensors."""
    parameters = sorted(model.named_parameters())
    device = parameters[0][1].device
    generator = torch.Generator(device=device)
    config = model.config
    values = config.num_key_value_heads * config.head_dim  # rows of them, the last of q, k and v
    for i, (name, parameter) in enumerate(parameters):
        generator.manual_seed(1000 + i)
        data = parameter.data
        if "norm" in name:
            data.fill_(1)
        elif data.dim() < 2:
            data.zero_()
        else:
            drawn = torch.randn(data.shape, generator=generator, device=device)
            if "embed" in name:
                topics = torch.randn((TOPICS, data.shape[1]), generator=generator, device=device)
                of_each = topics.repeat_interleave(-(-data.shape[0] // TOPICS), 0)[: data.shape[0]]
                data.copy_(0.5**0.5 * (of_each + drawn))
            else:
                if "qkv" in name:
                    drawn[: data.shape[0] - values] *= 2.0
                data.copy_(drawn * data.shape[1] ** -0.5)
    return len(parameters)


def text(count: int, seed: int) -> list[int]:
    """Return a prompt of so many tokens."""
    generator = random.Random(seed)
    per_topic = VOCABULARY // TOPICS
    ids: list[int] = []
    while len(ids) < count:
        first = generator.randrange(TOPICS) * per_topic
        ids += [first + generator.randrange(per_topic) for _ in range(RUN)]
    return ids[:count]
