"""Sparse attention in diffusers' transformers for images and video: a backend of diffusers' own registry.

    import flashprefill.diffusers as fd

    fd.patch_model(pipe.transformer, fp.XAttention(threshold=0.9, stride=8))

Attention there is not causal, so the policy has to be one that selects without causality: XAttention,
SpargeAttn, Dense or a MaskPolicy. Needs diffusers 0.35 or later. Nothing of diffusers is changed: the
registry takes a backend under a name of ours, and each attention layer's processor says which backend it
wants, as after ``set_attention_backend``.

A call that the kernel does not take (a mask, fewer than 128 rows, wanted gradients, fp32 on a GPU) runs
PyTorch's attention as before, with one warning for what a user would not expect.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from .api import prefill_attention
from .errors import FlashPrefillError, refuse, refuse_type, shown
from .policies import Policy
from .policies.text import parse
from .stats import Stats

__all__ = ["Call", "patch_model", "record_stats", "unpatch_model"]

LEAST_ROWS = 128  # of a call that may be sparse: a tile

_QUIET = {"short": "too few rows to leave any key out"}
_LOUD = {
    "mask": "an attention mask",
    "dropout": "dropout of the weights",
    "gradients": "gradients are wanted; run the model under torch.no_grad()",
    "parallel": "context parallelism of diffusers",
    "causal": "causal attention with fewer queries than keys, which PyTorch aligns at the first key",
}


@dataclass(frozen=True)
class Call:
    """A call of attention by a patched model.

    Attributes:
        rows: queries per sequence.
        keys: keys per sequence.
        stats: what was kept; None if the call ran PyTorch's attention.
        reason: why it did; "" if it did not.
    """

    rows: int
    keys: int
    stats: Stats | None
    reason: str

    @property
    def density(self) -> float:
        """Mean over sequences and heads of kept blocks over all blocks; 1 where nothing was left out."""
        return 1.0 if self.stats is None else float(self.stats.density.mean())


_recorders: list[list[Call]] = []
_members: dict[str, AttentionBackendName] = {}
_warned: set[str] = set()


def patch_model(model: Any, policy: Policy | str = "xattention") -> Any:
    """Have a transformer of diffusers compute attention by a policy. Patching it again changes the policy.

    Args:
        model: a model of diffusers (``pipe.transformer``), changed in place; layers whose processor goes
            through diffusers' attention backends take part.
        policy: a policy, or a text of one.

    Returns:
        The model.

    Raises:
        ArgumentTypeError, InvalidArgumentError: the policy is wrong or needs causality, or no layer of the
            model goes through attention backends.
    """
    policy = parse(policy) if isinstance(policy, str) else policy
    if not isinstance(policy, Policy):
        refuse_type("policy", shown(policy), "a policy, or a text of one")
    tiny = torch.zeros(1, 1, 1, 16)
    prefill_attention(tiny, tiny, tiny, policy, causal=False)  # refuses what needs causality
    member = _member_of(policy)
    for processor in _processors_of(model):
        processor._attention_backend = member
    return model


def unpatch_model(model: Any) -> Any:
    """Give a model back diffusers' default backend, as ``reset_attention_backend`` does.

    Args:
        model: a model that :func:`patch_model` has patched.

    Returns:
        The model.
    """
    processors = [each for each in _processors_of(model) if each._attention_backend in _members.values()]
    if not processors:
        refuse("model", f"a {type(model).__name__} that is not patched", "one that patch_model has patched")
    for processor in processors:
        processor._attention_backend = None
    return model


@contextlib.contextmanager
def record_stats() -> Iterator[list[Call]]:
    """Record the calls of attention of all patched models, in the order in which they come.

    Yields:
        The list that they are added to. To count blocks a GPU is waited for.
    """
    calls: list[Call] = []
    _recorders.append(calls)
    try:
        yield calls
    finally:
        _recorders[:] = [each for each in _recorders if each is not calls]


def _processors_of(model: Any) -> list[Any]:
    if not hasattr(model, "modules"):
        refuse_type("model", f"a {type(model).__name__}", "a model of diffusers, such as pipe.transformer")
    processors = [getattr(module, "processor", None) for module in model.modules()]
    processors = [each for each in processors if hasattr(each, "_attention_backend")]
    if not processors:
        refuse("model", f"a {type(model).__name__}", "one whose layers go through attention backends")
    return processors


def _member_of(policy: Policy) -> AttentionBackendName:
    """Return the registry's key of a policy, and register what it stands for.

    Keys are members of an enumeration that has none for others. One more is made here without adding it: it
    is of the right type, which is all that the registry and the dispatcher look at.
    """
    name = f"flashprefill:{policy.text}"
    member = _members.get(name)
    if member is None:
        member = str.__new__(AttentionBackendName, name)
        member._name_, member._value_ = name.upper(), name
        _AttentionBackendRegistry.register(member)(_backend_of(policy))
        _members[name] = member
    return member


def _backend_of(policy: Policy) -> Any:
    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> torch.Tensor:
        """Return attention [batch, tokens, heads, head_dim] of query over key and value, of such shapes."""
        reason = _why_dense((query, key, value), attn_mask, dropout_p, is_causal, _parallel_config)
        if not reason:
            watched = bool(_recorders) and not torch.compiler.is_compiling()
            try:
                result: Any = prefill_attention(
                    query,
                    key,
                    value,
                    policy,
                    causal=is_causal,
                    softmax_scale=scale,
                    layout="bthd",
                    return_stats=watched,
                )
            except FlashPrefillError as error:
                reason = str(error)
            else:
                out, stats = result if watched else (result, None)
                _record(query, key, stats, "")
                return out  # type: ignore[no-any-return]
        _say_once(reason)
        _record(query, key, None, reason)
        native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
        return native(  # type: ignore[no-any-return]
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            _parallel_config=_parallel_config,
        )

    return attention


def _why_dense(
    tensors: tuple[torch.Tensor, ...], mask: Any, dropout: float, causal: bool, parallel: Any
) -> str:
    rows, keys = tensors[0].shape[1], tensors[1].shape[1]
    if rows < LEAST_ROWS:
        return "short"
    if mask is not None:
        return "mask"
    if dropout:
        return "dropout"
    if causal and rows != keys:
        return "causal"
    if parallel is not None:
        return "parallel"
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return "gradients" if gradients else ""


def _record(query: torch.Tensor, key: torch.Tensor, stats: Stats | None, reason: str) -> None:
    if not torch.compiler.is_compiling():
        for calls in _recorders:
            calls.append(Call(query.shape[1], key.shape[1], stats, reason))


def _say_once(reason: str) -> None:
    if reason in _QUIET or torch.compiler.is_compiling() or reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(
        f"flashprefill: attention runs densely, as without flashprefill, because of this: "
        f"{_LOUD.get(reason, reason)}",
        stacklevel=4,
    )
