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
UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9  # gguf's types of values
ALIGNMENT = 32


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


Value = int | float | str | list[int] | list[float] | list[str]


def _array(values: list[int] | list[float] | list[str]) -> bytes:
    kind = {str: STRING, int: INT32, float: FLOAT32}[type(values[0])]
    head = struct.pack("<IIQ", ARRAY, kind, len(values))
    if kind == STRING:
        return head + b"".join(_text(value) for value in values)
    return head + np.array(values, "<i4" if kind == INT32 else "<f4").tobytes()


def _value(name: str, value: Value) -> bytes:
    if isinstance(value, list):
        return _text(name) + _array(value)
    if isinstance(value, str):
        return _text(name) + struct.pack("<I", STRING) + _text(value)
    kind, form = (UINT32, "<II") if isinstance(value, int) else (FLOAT32, "<If")
    return _text(name) + struct.pack(form, kind, value)


def _gguf(path: Path, values: dict[str, Value], tensors: dict[str, np.ndarray]) -> None:
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
    path: Path,
    architecture: str,
    layers: int,
    norms: tuple[str, ...],
    more: dict[str, int | float],
    tokenizer: dict[str, Value] | None = None,
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
    values: dict[str, Value] = {"general.architecture": architecture}
    values |= {f"tokenizer.ggml.{name}": v for name, v in (tokenizer or {"model": "no_vocab"}).items()}
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


def llama(path: Path, tokenizer: dict[str, Value] | None = None) -> Path:
    more: dict[str, int | float] = {"rope.dimension_count": HEAD_DIM}
    return _model(path, "llama", 4, ("attn_norm", "ffn_norm"), more, tokenizer)


def llama_that_writes(path: Path) -> Path:
    """Llama with a vocabulary of words, which llama-server wants. It is for prompts that are tokens."""
    normal, unknown, control = 1, 2, 3  # llama_token_type
    tokenizer: dict[str, Value] = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *(f"\u2581w{i}" for i in range(3, VOCABULARY))],
        "scores": [0.0] * VOCABULARY,
        "token_type": [unknown, control, control] + [normal] * (VOCABULARY - 3),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return llama(path, tokenizer)


def gemma2(path: Path) -> Path:
    norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    more = {
        "attention.sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    return _model(path, "gemma2", LAYERS, norms, more)
