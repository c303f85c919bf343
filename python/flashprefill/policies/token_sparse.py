"""TokenSparse: attention over the tokens that matter, by any policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedError, refuse, refuse_type, shown
from .base import Policy
from .checks import MAX_TOKENS, check_bool, check_integer, check_number
from .presets import preset_of

_SHARE_BELOW_1 = "at least 0 and below 1"


@dataclass(frozen=True, repr=False)
class TokenSparse(Policy):
    """Token Sparse Attention (arXiv 2602.03216): tokens are left out before any policy selects.

    On a GPU the host decides which, so a call waits for the device and can't be captured in a graph.

    Each query head looks at the exact softmax of its prompt's last rows, drops the tokens that hold least of
    it, and attends over the rest, queries as well as keys, by ``inner``. Rows of dropped tokens are zeros,
    with a lse of -inf: in a model they pass by in the residual. The layer's keys and values stay whole in the
    cache. See docs/methods/tokensparse.md.

    It is a wrapper and not a selection: it has no mask, so :func:`flashprefill.select` refuses it, and it
    lives in Python, around the library's verbs. Sequences with a cached prefix, chunks that do not end their
    prompt, and prompts of at most ``min_tokens + window`` tokens go to ``inner`` whole; ``Stats.reasons`` say
    so.

    Args:
        inner: the policy that attends over the kept tokens, or a text of one; dense, the default, is the
            paper's own.
        coverage: the share of the mass, summed over heads, that the dropped tokens may hold, in [0, 1). 0:
            none is dropped.
        window: the last rows, whose softmax counts, and which are kept.
        pool: tokens over which scores are averaged, odd.
        min_tokens: tokens that are kept besides the window, at least.
        per_kv_head: the query heads of a KV head keep the same tokens, those of their mean score. False, as
            published: each query head has its own, and its own copy of their keys and values.
        layers: numbers of the layers of a model that drop tokens; the others have ``inner``. None: in a
            model those of its second half, which is the authors' choice for models that they did not study,
            and outside of a model every call.
    """

    inner: Policy | str = "dense"
    coverage: float = 0.005
    window: int = 128
    pool: int = 7
    min_tokens: int = 1024
    per_kv_head: bool = False
    layers: Sequence[int] | None = None

    kind = "tokensparse"
    _row = "streaming"

    def __post_init__(self) -> None:
        inner = self.inner
        if isinstance(inner, str):
            from .text import parse

            inner = parse(inner)
        if not isinstance(inner, Policy):
            refuse_type("inner", shown(inner), "a policy, or a text of one")
        if isinstance(inner, TokenSparse):
            refuse("inner", inner.text, "a policy that selects: tokens are dropped once")
        values: dict[str, Any] = {
            "inner": inner,
            "coverage": check_number("coverage", self.coverage),
            "window": check_integer("window", self.window, 1, MAX_TOKENS),
            "pool": check_integer("pool", self.pool, 1, 4095),
            "min_tokens": check_integer("min_tokens", self.min_tokens, 1, MAX_TOKENS),
            "per_kv_head": check_bool("per_kv_head", self.per_kv_head),
            "layers": None if self.layers is None else self._numbers(self.layers),
        }
        if not 0 <= values["coverage"] < 1:
            refuse("coverage", values["coverage"], _SHARE_BELOW_1)
        if values["pool"] % 2 == 0:
            refuse("pool", values["pool"], "odd")
        for name, value in values.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "block_size", inner.block_size)
        object.__setattr__(self, "text", self._spelled(values))
        object.__setattr__(self, "source", "")

    @staticmethod
    def _numbers(layers: Any) -> tuple[int, ...]:
        if isinstance(layers, (str, bytes)) or not hasattr(layers, "__iter__"):
            refuse_type("layers", shown(layers), "a list of layers' numbers, or None")
        return tuple(check_integer("a layer of layers", layer, 0, MAX_TOKENS) for layer in layers)

    def _spelled(self, values: dict[str, Any]) -> str:
        shown = [f"inner={values['inner'].text}"]
        for field in dataclasses.fields(self)[1:]:
            value = values[field.name]
            if field.name == "coverage" or value != field.default:
                shown.append(f"{field.name}={self._spell(field.name, value)}")
        return f"{self.kind}({', '.join(shown)})"

    def _spell(self, name: str, value: Any) -> str:
        return str(value) if isinstance(value, float) else super()._spell(name, value)

    @property
    def policy(self) -> Policy:
        """``inner``, which is a policy by now."""
        assert isinstance(self.inner, Policy)
        return self.inner

    def at_layer(self, layer: int) -> Policy:
        """Return the policy for one layer of a model: ``inner`` where tokens are not dropped."""
        inner = self.policy.at_layer(layer)
        if self.layers is not None and layer not in self.layers:
            return inner
        return dataclasses.replace(self, inner=inner)

    def _in_model(self, layers: int) -> Policy:
        return (
            self if self.layers is not None else dataclasses.replace(self, layers=range(layers // 2, layers))
        )

    def _at_heads(self, first: int, past: int, heads: int) -> TokenSparse:
        if (first, past) != (0, heads):
            raise UnsupportedError(
                f"{self.kind} counts tokens over all heads: heads {first} to {past - 1} of {heads} can't be "
                "taken alone"
            )
        return self

    @classmethod
    def for_model(cls, model: Any, **changes: Any) -> TokenSparse:
        """Return the wrapper with the coverage and the layers that its authors publish for a model.

        Args:
            model: as :meth:`Policy.for_model` takes it.
            **changes: other fields, ``inner`` among them.
        """
        preset = preset_of(cls.kind, model)
        made = cls(**{**preset.values, **changes})
        object.__setattr__(made, "source", preset.source)
        return made
