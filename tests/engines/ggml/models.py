"""A small model of random weights whose attention the plugin does not know, as a GGUF file.

Gemma 2's layers have logit softcapping. The file is written by hand (format:
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


def gemma2(path: Path) -> Path:
    random = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return random.normal(0, 0.2, shape)

    tensors = {"token_embd.weight": weights(VOCABULARY, EMBEDDING), "output_norm.weight": np.ones(EMBEDDING)}
    for layer in range(LAYERS):
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
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = np.ones(EMBEDDING)
    values: dict[str, int | float | str] = {
        "general.architecture": "gemma2",
        "gemma2.context_length": 8192,
        "gemma2.embedding_length": EMBEDDING,
        "gemma2.block_count": LAYERS,
        "gemma2.feed_forward_length": WIDE,
        "gemma2.attention.head_count": HEADS,
        "gemma2.attention.head_count_kv": KV_HEADS,
        "gemma2.attention.key_length": HEAD_DIM,
        "gemma2.attention.value_length": HEAD_DIM,
        "gemma2.attention.layer_norm_rms_epsilon": 1e-6,
        "gemma2.attention.sliding_window": 4096,
        "gemma2.attn_logit_softcapping": 50.0,
        "gemma2.final_logit_softcapping": 30.0,
        "gemma2.vocab_size": VOCABULARY,
        "tokenizer.ggml.model": "no_vocab",
    }
    _gguf(path, values, tensors)
    return path
