"""Small models of random weights, as GGUF files: of Llama's architecture, and of Gemma 2's, whose logit
softcapping the plugin does not know.

The files are written by hand (format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), since llama.cpp's own writer is another package.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

EMBEDDING, LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDE, VOCABULARY = 128, 2, 4, 2, 64, 192, 512
UINT32, FLOAT32, STRING = 4, 6, 8  # gguf's types of values
ALIGNMENT = 32


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _value(name: str, value: int | float | str) -> bytes:
    if isinstance(value, str):
        return _text(name) + struct.pack("<I", STRING) + _text(value)
    kind, form = (UINT32, "<II") if isinstance(value, int) else (FLOAT32, "<If")
    return _text(name) + struct.pack(form, kind, value)


def _gguf(path: Path, values: dict[str, int | float | str], tensors: dict[str, np.ndarray]) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    head += b"".join(_value(*item) for item in values.items())
    data = b""
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]  # ggml's first axis is the innermost
        head += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        data += tensor.astype("<f4").tobytes()
        data += bytes(-len(data) % ALIGNMENT)
    path.write_bytes(head + bytes(-len(head) % ALIGNMENT) + data)


def _model(
    path: Path, architecture: str, layers: int, norms: tuple[str, ...], more: dict[str, int | float]
) -> Path:
    random = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return random.normal(0, 0.2, shape)

    tensors = {"token_embd.weight": weights(VOCABULARY, EMBEDDING), "output_norm.weight": np.ones(EMBEDDING)}
    for layer in range(layers):
        names = {
            "attn_q": (HEADS * HEAD_DIM, EMBEDDING),
            "attn_k": (KV_HEADS * HEAD_DIM, EMBEDDING),
            "attn_v": (KV_HEADS * HEAD_DIM, EMBEDDING),
            "attn_output": (EMBEDDING, HEADS * HEAD_DIM),
            "ffn_gate": (WIDE, EMBEDDING),
            "ffn_up": (WIDE, EMBEDDING),
            "ffn_down": (EMBEDDING, WIDE),
        }
        for name, shape in names.items():
            tensors[f"blk.{layer}.{name}.weight"] = weights(*shape)
        for name in norms:
            tensors[f"blk.{layer}.{name}.weight"] = np.ones(EMBEDDING)
    values: dict[str, int | float | str] = {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "no_vocab",
    }
    of_architecture = {
        "context_length": 8192,
        "embedding_length": EMBEDDING,
        "block_count": layers,
        "feed_forward_length": WIDE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "vocab_size": VOCABULARY,
        **more,
    }
    values.update({f"{architecture}.{name}": value for name, value in of_architecture.items()})
    _gguf(path, values, tensors)
    return path


def llama(path: Path) -> Path:
    return _model(path, "llama", 4, ("attn_norm", "ffn_norm"), {"rope.dimension_count": HEAD_DIM})


def gemma2(path: Path) -> Path:
    norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    more = {
        "attention.sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    return _model(path, "gemma2", LAYERS, norms, more)
