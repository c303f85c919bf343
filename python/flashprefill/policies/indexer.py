"""An indexer: the weights by which VSPrefill predicts a head's verticals and slashes, and their file.

The file is safetensors, read and written here with NumPy alone, so that a policy needs no PyTorch. For layer
l and KV head h it has, in bf16 or fp32,

    layers.l.kv.h.up        [hidden, 2 head_dim]    W_U: its columns are those of the key, then the value
    layers.l.kv.h.bias      [hidden]                b_U
    layers.l.kv.h.vertical  [hidden]                w_v
    layers.l.kv.h.slash     [hidden]                w_s

and in its metadata, as text, what they are for: see `Indexer`. A layer that is missing has no indexer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError, refuse, shown

METHOD, VERSION, SLASH = "vsprefill", "1", "offset"
PARTS = ("up", "bias", "vertical", "slash")
_NAME = re.compile(r"layers\.(\d{1,6})\.kv\.(\d{1,4})\.(\w+)")
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2")}
_MOST_HEADER = 100 << 20  # bytes, the limit of the format's own library

Floats = npt.NDArray[np.float32]


class LayerWeights(NamedTuple):
    """The weights of one layer, fp32: a KV head each."""

    up: Floats  # [kv_heads, hidden, 2 head_dim]
    bias: Floats  # [kv_heads, hidden]
    vertical: Floats  # [kv_heads, hidden]
    slash: Floats  # [kv_heads, hidden]


@dataclass(frozen=True, eq=False)
class Indexer:
    """Weights by layer, and what they were trained for.

    Args:
        layers: the weights of each layer that has some.
        model: the name of the model whose keys and values they read.
        rope_theta: the rotary base of its positions, or None: keys carry them, so another base would make
            other keys of the same text.
        notes: more metadata: how it was trained. Text only.
    """

    layers: Mapping[int, LayerWeights]
    model: str
    rope_theta: float | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            refuse("layers", "empty", "weights of at least one layer")
        first = next(iter(self.layers.values()))
        for number, layer in self.layers.items():
            shapes = tuple(part.shape for part in layer)
            kv_heads, hidden, inputs = first.up.shape
            small = (kv_heads, hidden)
            if shapes != ((kv_heads, hidden, inputs), small, small, small) or inputs % 2:
                refuse(f"layer {number}'s shapes", shapes, f"those of {kv_heads} KV heads and {hidden} units")
            if not all(np.isfinite(part).all() for part in layer):
                refuse(f"layer {number}'s weights", "not finite", "finite numbers")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Indexer) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def kv_heads(self) -> int:
        """KV heads of each layer."""
        return int(next(iter(self.layers.values())).up.shape[0])

    @property
    def hidden(self) -> int:
        """Hidden units of each indexer."""
        return int(next(iter(self.layers.values())).up.shape[1])

    @property
    def head_dim(self) -> int:
        """Dimensions of a key."""
        return int(next(iter(self.layers.values())).up.shape[2]) // 2

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that two indexers with other weights do not share."""
        digest = hashlib.sha256()
        for number in sorted(self.layers):
            digest.update(struct.pack("<q", number))
            for part in self.layers[number]:
                digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()[:16]

    def metadata(self) -> dict[str, str]:
        """What the file says about the weights."""
        own = {
            "method": METHOD,
            "version": VERSION,
            "model": self.model,
            "n_kv_heads": str(self.kv_heads),
            "head_dim": str(self.head_dim),
            "hidden": str(self.hidden),
            "slash": SLASH,
        }
        if self.rope_theta is not None:
            own["rope_theta"] = f"{self.rope_theta:g}"
        return {**{key: str(value) for key, value in self.notes.items()}, **own}

    def check_model(self, config: Any) -> None:
        """Refuse a model with other KV heads, another head_dim, fewer layers or another rotary base.

        Args:
            config: the model's configuration.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = getattr(text, "num_attention_heads", None)
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None)
        for name, ours, theirs in (
            ("KV heads", self.kv_heads, kv_heads),
            ("head_dim", self.head_dim, head_dim),
        ):
            if theirs is not None and ours != theirs:
                self._mismatch(f"{name} {ours}", f"the model has {theirs}")
        layers = getattr(text, "num_hidden_layers", None)
        if layers is not None and max(self.layers) >= layers:
            self._mismatch(f"weights of layer {max(self.layers)}", f"the model has {layers} layers")
        rope = getattr(text, "rope_parameters", None)
        theta = rope.get("rope_theta") if isinstance(rope, dict) else getattr(text, "rope_theta", None)
        if self.rope_theta is not None and theta is not None and f"{theta:g}" != f"{self.rope_theta:g}":
            self._mismatch(f"the rotary base {self.rope_theta:g}", f"the model has {theta:g}")

    def _mismatch(self, ours: str, theirs: str) -> None:
        raise InvalidArgumentError(f"weights: the indexer of {self.model} is for {ours}, and {theirs}")

    def save(self, path: str | os.PathLike[str], dtype: str = "bf16") -> None:
        """Write the file.

        Args:
            path: where to.
            dtype: "bf16", rounded to nearest, or "fp32".
        """
        name = {"bf16": "BF16", "fp32": "F32"}.get(dtype) or refuse("dtype", shown(dtype), "bf16 or fp32")
        header: dict[str, Any] = {"__metadata__": self.metadata()}
        chunks, at = [], 0
        for number in sorted(self.layers):
            for head in range(self.kv_heads):
                for part, values in zip(PARTS, self.layers[number], strict=True):
                    one = np.ascontiguousarray(values[head], dtype=np.float32)
                    data = (rounded_bf16(one) if name == "BF16" else one.astype("<f4")).tobytes()
                    header[f"layers.{number}.kv.{head}.{part}"] = {
                        "dtype": name,
                        "shape": list(one.shape),
                        "data_offsets": [at, at + len(data)],
                    }
                    chunks.append(data)
                    at += len(data)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Indexer:
        """Read the file.

        Raises:
            OSError: it can't be opened.
            InvalidArgumentError: it is no such file; the message says where it differs.
        """
        name = os.fspath(path)
        header, data = _open(Path(path), name)
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict):
            refuse("weights", f"{name!r} without metadata", "a file of `flashprefill train-indexer`")
        for key, ours in (("method", METHOD), ("version", VERSION), ("slash", SLASH)):
            if metadata.get(key) != ours:
                refuse(f"weights: {name!r}'s {key}", shown(metadata.get(key)), shown(ours))
        found: dict[int, dict[tuple[int, str], Floats]] = {}
        for key, entry in header.items():
            match = _NAME.fullmatch(key)
            if not match or match[3] not in PARTS:
                refuse(f"weights: a tensor of {name!r}", shown(key[:60]), "named like layers.3.kv.0.up")
            found.setdefault(int(match[1]), {})[int(match[2]), match[3]] = _tensor(
                entry, data, f"{name!r}'s {key}"
            )
        sizes = [_whole(metadata, key, name) for key in ("n_kv_heads", "hidden", "head_dim")]
        layers = {number: _layer(found[number], number, sizes, name) for number in sorted(found)}
        if not layers:
            refuse("weights", f"{name!r} without tensors", "a file of `flashprefill train-indexer`")
        theta = metadata.get("rope_theta")
        try:
            base = None if theta is None else float(theta)
        except (TypeError, ValueError, OverflowError):
            refuse(f"weights: {name!r}'s rope_theta", shown(theta)[:60], "a number")
        known = ("method", "version", "model", "n_kv_heads", "head_dim", "hidden", "slash", "rope_theta")
        notes = {key: str(value) for key, value in metadata.items() if key not in known}
        return cls(layers, str(metadata.get("model", "")), base, notes)


def rounded_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """Return finite fp32 numbers as the bits of bf16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _open(path: Path, name: str) -> tuple[dict[str, Any], memoryview]:
    """Return a file's header and the bytes of its tensors."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else -1
    if not 0 < length <= min(len(content) - 8, _MOST_HEADER):
        refuse("weights", f"{name!r}, which cannot be read", "a safetensors file")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        refuse("weights", f"{name!r}, which cannot be read", "a safetensors file")
    if not isinstance(header, dict):
        refuse("weights", f"{name!r}, which cannot be read", "a safetensors file")
    return header, memoryview(content)[8 + length :]


def _tensor(entry: Any, data: memoryview, name: str) -> Floats:
    """Return one tensor as fp32."""
    try:
        kind, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        values: npt.NDArray[Any] = np.frombuffer(data[begin:end], dtype=kind).reshape(shape)
    except KeyError:
        refuse(f"weights: {name}", "of another dtype", "BF16 or F32")
    except (TypeError, ValueError, OverflowError):
        refuse(f"weights: {name}", "damaged", "as long as its shape says")
    wide: Floats = values.astype(np.uint32 if kind == _DTYPES["BF16"] else np.float32)
    return (wide.view(np.uint32) << 16).view(np.float32) if kind == _DTYPES["BF16"] else wide


def _whole(metadata: Mapping[str, Any], key: str, name: str) -> int:
    text = str(metadata.get(key))
    if not (text.isascii() and text.isdecimal() and 0 < len(text) < 8 and int(text) > 0):
        refuse(f"weights: {name!r}'s {key}", shown(metadata.get(key)), "a whole number above 0")
    return int(text)


def _layer(found: dict[tuple[int, str], Floats], number: int, sizes: list[int], name: str) -> LayerWeights:
    """Return a layer's weights, a KV head after the other; refuse what is missing or of another shape."""
    kv_heads, hidden, head_dim = sizes
    shapes = {"up": (hidden, 2 * head_dim), "bias": (hidden,), "vertical": (hidden,), "slash": (hidden,)}
    for (head, part), tensor in found.items():
        if head >= kv_heads:
            refuse(
                f"weights: {name!r}'s layers.{number}.kv.{head}",
                "there",
                f"of {kv_heads} KV heads, as n_kv_heads",
            )
        if tensor.shape != shapes[part]:
            where = f"weights: the shape of {name!r}'s layers.{number}.kv.{head}.{part}"
            refuse(where, list(tensor.shape), f"{list(shapes[part])}, by hidden and head_dim")
    parts = []
    for part in PARTS:
        for head in range(kv_heads):
            if (head, part) not in found:
                refuse(f"weights: {name!r}'s layers.{number}.kv.{head}.{part}", "missing", "there")
        parts.append(np.stack([found[head, part] for head in range(kv_heads)]))
    return LayerWeights(*parts)
