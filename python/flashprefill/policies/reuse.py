"""Reuse: masks of one layer used by later ones."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._masks_held import HeldMasks
from ..errors import UnsupportedError, refuse, refuse_type, shown
from .base import Policy
from .checks import check_integer

SCHEMA = "flashprefill-reuse/1"
_MAX_LAYERS, _MAX_HEADS = 1 << 16, 4096


@dataclass(frozen=True)
class Borrowed:
    """Where a layer's mask comes from.

    Args:
        source: the number of the earlier layer that selects for it.
        heads: for each head of this layer the head of that one whose choice it takes; None: its own number.
            Heads are those of masks: KV heads where the inner policy shares lists.
    """

    source: int
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ReusePlan:
    """Which layers select for themselves, and from where the others take their masks.

    Args:
        layers: for each layer None, if it selects, or what it borrows.
        policy: the text of the policy that the plan was made with; "" if that is not known.
        model: the name of the model that it was made for.
        notes: how it was made, and what it was measured to lose.
    """

    layers: tuple[Borrowed | None, ...]
    policy: str = ""
    model: str = ""
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, hash=False)

    def __post_init__(self) -> None:
        for number, own in enumerate(self.layers):
            if own is None:
                continue
            if not 0 <= own.source < number:
                refuse(
                    f"plan's layer {number}'s source", own.source, f"an earlier layer, from 0 to {number - 1}"
                )
            if self.layers[own.source] is not None:
                refuse(f"plan's layer {number}'s source", own.source, "a layer that selects for itself")

    @property
    def sources(self) -> dict[int, int]:
        """The last layer that reads each source's mask, by source."""
        return {own.source: number for number, own in enumerate(self.layers) if own is not None}

    @property
    def share(self) -> float:
        """Share of the layers that borrow."""
        return sum(own is not None for own in self.layers) / max(1, len(self.layers))

    def as_json(self) -> dict[str, Any]:
        """What :meth:`save` writes."""
        layers: list[Any] = []
        for own in self.layers:
            heads = None if own is None or own.heads is None else list(own.heads)
            layers.append(None if own is None else {"source": own.source, "heads": heads})
        return {"schema": SCHEMA, "model": self.model, "policy": self.policy, "layers": layers, **self.notes}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ReusePlan:
        """Read it.

        Raises:
            OSError: the file can't be opened.
            InvalidArgumentError, ArgumentTypeError: it is no plan; the message says where.
        """
        name = os.fspath(path)
        try:
            content = json.loads(Path(path).read_bytes())
        except (ValueError, RecursionError):
            refuse("plan", f"{name!r}, which cannot be read", "a file of `flashprefill plan-reuse`")
        if not isinstance(content, Mapping) or content.get("schema") != SCHEMA:
            refuse("plan", f"{name!r} of another kind", f"a file of `flashprefill plan-reuse` ({SCHEMA})")
        layers = content.get("layers")
        if not isinstance(layers, list) or len(layers) > _MAX_LAYERS:
            refuse_type(
                f"plan: {name!r}'s layers", type(layers).__name__, "a list with an entry for each layer"
            )
        known = ("schema", "model", "policy", "layers")
        notes = {key: value for key, value in content.items() if key not in known}
        found = tuple(_borrowed(number, entry) for number, entry in enumerate(layers))
        return cls(found, str(content.get("policy", "")), str(content.get("model", "")), notes)


def _borrowed(number: int, entry: Any) -> Borrowed | None:
    if entry is None:
        return None
    if not isinstance(entry, Mapping) or "source" not in entry:
        refuse_type(f"plan's layer {number}", shown(entry)[:60], 'None, or {"source": layer, "heads": [...]}')
    source = check_integer(f"plan's layer {number}'s source", entry["source"], 0, _MAX_LAYERS)
    heads = entry.get("heads")
    if heads is None:
        return Borrowed(source)
    if not isinstance(heads, Sequence) or isinstance(heads, str) or not heads:
        refuse_type(
            f"plan's layer {number}'s heads", shown(heads)[:60], "a list of the source's heads, or None"
        )
    return Borrowed(
        source, tuple(check_integer(f"a head of layer {number}", h, 0, _MAX_HEADS) for h in heads)
    )


@dataclass(frozen=True, repr=False)
class Reuse(Policy):
    """Some layers of a model select, the others take the mask of an earlier one (HyLRA, arXiv 2602.00777).

    Which, a plan says, which ``flashprefill plan-reuse`` makes for a model: with a map of heads, since the
    heads of two layers have no common order. Masks of a forward belong to that forward alone: to its batch,
    its chunk, its thread. Where a layer finds no mask of its forward's (its source ran dense for a reason of
    its own, or the model is compiled) it selects for itself. See docs/methods/reuse.md.

    It is for models: :meth:`at_layer`, which :func:`flashprefill.patch_model` calls, makes one policy for
    each layer, and these share the masks.

    Args:
        plan: a :class:`ReusePlan`, or the path of its file.
        inner: the policy that selects, or a text of one; the default is the plan's.
        layer: the layer whose part it plays, which :meth:`at_layer` sets.
    """

    plan: Any
    inner: Policy | str | None = None
    layer: int | None = None

    kind = "reuse"
    _row = "streaming"

    def __post_init__(self) -> None:
        plan, inner = self.plan, self.inner
        if isinstance(plan, (str, os.PathLike)):
            plan = ReusePlan.load(plan)
        if not isinstance(plan, ReusePlan):
            refuse_type("plan", f"a {type(plan).__name__}", "a ReusePlan, or the path of its file")
        if inner is None:
            inner = plan.policy or refuse(
                "inner", None, "a policy: the plan does not say with which it was made"
            )
        if isinstance(inner, str):
            from .text import parse

            inner = parse(inner)
        if not isinstance(inner, Policy):
            refuse_type("inner", shown(inner), "a policy, or a text of one")
        if isinstance(inner, Reuse):
            refuse("inner", inner.text, "a policy that selects")
        if self.layer is not None:
            check_integer("layer", self.layer, 0, _MAX_LAYERS)
        layer = "" if self.layer is None else f", layer={self.layer}"
        own = {"plan": plan, "inner": inner, "block_size": inner.block_size, "source": ""}
        own["text"] = f"reuse(inner={inner.text}, share={plan.share:.2f}{layer})"
        own["share_heads"] = inner.share_heads
        for name in ("sink_blocks", "window_blocks", "dense_tail_blocks"):
            own[name] = getattr(inner, name, 0)
        own["_held"] = HeldMasks(plan.sources)
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def __reduce__(self) -> Any:
        return _made, (self.plan, self.inner, self.layer, self.held)

    @property
    def held(self) -> HeldMasks:
        """The masks of the forward that is under way, which the policies of all layers share."""
        held: HeldMasks = self._held  # type: ignore[attr-defined]
        return held

    @property
    def policy(self) -> Policy:
        """``inner``, which is a policy by now."""
        assert isinstance(self.inner, Policy)
        return self.inner

    @property
    def borrowed(self) -> Borrowed | None:
        """Where this layer's mask comes from; None if it selects."""
        inside = self.layer is not None and self.layer < len(self.plan.layers)
        return self.plan.layers[self.layer] if inside else None

    @property
    def corrects(self) -> bool | str:
        """Whether blocks left out count by their means, or by summary keys (``"summary"``)."""
        return self.policy.corrects

    @property
    def reads_values(self) -> bool:  # type: ignore[override]
        """Whether the inner policy selects by values too."""
        return self.policy.reads_values

    def at_layer(self, layer: int) -> Policy:
        """Return the policy for one layer of a model, or the inner one where no other layer is concerned."""
        inner = self.policy.at_layer(layer)
        inside = layer < len(self.plan.layers) and self.plan.layers[layer] is not None
        return _made(self.plan, inner, layer, self.held) if inside or layer in self.plan.sources else inner

    def check_model(self, config: Any) -> None:
        """Refuse a model with another number of layers, or with heads that the plan does not know."""
        self.policy.check_model(config)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        layers = getattr(text, "num_hidden_layers", None)
        if layers is not None and layers != len(self.plan.layers):
            refuse("plan", f"of {len(self.plan.layers)} layers", f"of the model's {layers}")
        heads = getattr(text, "num_attention_heads", None)
        if self.share_heads:
            heads = getattr(text, "num_key_value_heads", None) or heads
        for number, own in enumerate(self.plan.layers):
            if heads is None or own is None or own.heads is None:
                continue
            if len(own.heads) != heads or max(own.heads) >= heads:
                refuse(f"plan's layer {number}", f"of {len(own.heads)} heads", f"of the model's {heads}")

    def _at_heads(self, first: int, past: int, heads: int) -> Policy:
        raise UnsupportedError("a Reuse plan is for a model's forward in one place, not over ranks")


def _made(plan: ReusePlan, inner: Policy, layer: int | None, held: HeldMasks) -> Reuse:
    """A policy whose masks are others' too."""
    policy = Reuse(plan, inner, layer)
    object.__setattr__(policy, "_held", held)
    return policy
