"""Masks, which Transformers asks for once per forward, before any layer runs.

SDPA's mask is a bool for each pair of query and key: 17 GB for a chunk of a padded prompt of 128K tokens.
We need two flags for each *key position* (is it a token or padding; does a query row stand there), from
which each sequence's range of rows and keys follows: *roles*, a bool tensor [batch, keys, 1, 2]. It has
four axes because Transformers hands a mask of four axes through unchanged, and this odd shape because it
can't be broadcast against scores: code that would take it for a mask of pairs fails loudly instead of
attending to the future.

What is not plainly causal gets SDPA's mask (a window that has begun to slide, packed sequences, images that
see both ways, decode steps), and None means what it means for SDPA: queries and keys are the same tokens,
and causal unless the module says otherwise.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_utils import PreTrainedModel

from .fallback import note_once

# Rows of a query tile. Fewer rows than that are a decode step or a prompt's last crumbs: dense is as fast.
MIN_ROWS = 128


class Span(NamedTuple):
    """Sequences [batch_begin, batch_end) of a batch that have the same rows and keys."""

    batch_begin: int
    batch_end: int
    row_begin: int
    row_end: int
    key_begin: int
    key_end: int


@dataclass
class Plan:
    """The content of roles, read once per forward and kept with them."""

    first_query: int  # the position of the first row
    used: int  # positions up to and with the last row
    spans: list[Span]
    holes: bool  # padding between tokens
    short: bool = False  # the mask left out the last tokens, which note_once has said
    pairs: torch.Tensor | None = field(default=None, repr=False)  # SDPA's mask, if a layer wanted it


def flashprefill_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: Any = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return None, roles, or SDPA's mask: the function that AttentionMaskInterface calls."""
    if not torch.compiler.is_compiling():
        _grad.mode = torch.is_grad_enabled()
    readable = can_read(attention_mask, device)
    short = False
    if readable and attention_mask is not None and attention_mask.ndim == 2 and not kv_offset:
        short = _is_short(attention_mask, q_length, q_offset, config)
    if attention_mask is not None and attention_mask.is_meta:
        allow_is_causal_skip = False  # sdpa_mask would look whether there is padding
    plain = (
        readable
        and q_length >= MIN_ROWS
        and allow_is_causal_skip  # False: pairs are wanted, or something is laid over the causal mask
        and not use_vmap
        and kv_offset == 0
        and (attention_mask is None or attention_mask.ndim == 2)
        and (mask_function is causal_mask_function or local_size is not None)
        and _takes_other_masks(config)
    )
    if plain:
        first = int(q_offset)  # a tensor for StaticCache
        used = first + q_length
        # Inside one window, or one chunk of chunked attention, every key before a row is visible.
        if used <= kv_length and (local_size is None or used <= local_size):
            tokens = None if attention_mask is None else attention_mask[:, :used]
            if tokens is not None and tokens.shape[1] == used and bool(tokens.all()):
                tokens = None
            if tokens is None and first == 0 and used == kv_length:
                return None
            roles = torch.zeros(batch_size, kv_length, 1, 2, dtype=torch.bool, device=device)
            if tokens is None:
                roles[:, :used, 0, 0] = True
            else:
                roles[:, : tokens.shape[1], 0, 0] = tokens.to(device=device, dtype=torch.bool)
            roles[:, first:used, 0, 1] = True
            roles._flashprefill_short = short  # type: ignore[attr-defined]
            return roles
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        config=config,
        **kwargs,
    )


class _Grad(threading.local):
    mode = False


_grad = _Grad()


def forward_had_grad_mode() -> bool:
    """Return whether grad mode was on when this thread's forward made its mask.

    It is off again in the layers of a reentrant torch.utils.checkpoint, whose results get gradients later.
    """
    return _grad.mode


def can_read(tensor: torch.Tensor | None, device: Any) -> bool:
    """Return whether values can be looked at: not while a graph is traced, nor where there is no memory."""
    if torch.compiler.is_compiling() or is_jit_tracing() or is_watched():
        return False
    if tensor is not None and (type(tensor) is not torch.Tensor or is_wrapped(tensor)):
        return False
    kind = torch.device(device).type
    if kind == "cuda":
        return not torch.cuda.is_current_stream_capturing()
    return kind == "cpu"


def is_jit_tracing() -> bool:
    """Return whether torch.jit.trace, or ONNX's older export, records what is called."""
    return bool(torch._C._get_tracing_state())


def is_general_export(rows: Any) -> bool:
    """Return whether torch.export records lengths as symbols, or for ONNX, which has no operator like ours.

    What is sparse from a tile of rows on would not hold for all lengths.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_dynamo_compiling():
        return False
    return isinstance(rows, torch.SymInt) or torch.onnx.is_in_onnx_export()


def is_watched() -> bool:
    """Return whether a mode is on that sees every operator of PyTorch's, and would not see ours."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Return whether a tensor stands for another one inside torch.func's transforms."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _is_short(mask: torch.Tensor, q_length: int, q_offset: Any, config: Any) -> bool:
    """Warn of a mask that leaves out the new tokens: Transformers takes what is missing for padding."""
    if isinstance(q_offset, torch.Tensor) and q_length < MIN_ROWS:
        return False  # a static cache's decode step: reading it is not worth a synchronisation
    used = int(q_offset) + q_length
    if mask.shape[1] < used and int(q_offset) > 0:
        who = type(config).__name__.removesuffix("Config")
        cached = int(q_offset)
        detail = f"attention_mask has {mask.shape[1]} entries for {cached} cached and {q_length} new tokens"
        note_once("short mask", who, detail)
        return True
    return False


def models_of(module: str) -> list[type[PreTrainedModel]]:
    """Return the classes of models that a modeling file defines or imports."""
    names = vars(sys.modules[module]) if module in sys.modules else {}
    kinds = [x for x in names.values() if isinstance(x, type) and issubclass(x, PreTrainedModel)]
    return [kind for kind in kinds if kind is not PreTrainedModel]


_tolerant: dict[type, bool] = {}


def _takes_other_masks(config: Any) -> bool:
    """Return whether the config's models hand masks through untouched, as flash attention's must be."""
    kind = type(config)
    if kind not in _tolerant:
        models = models_of(kind.__module__.replace("configuration_", "modeling_"))
        _tolerant[kind] = any(model._supports_flash_attn for model in models)
    return _tolerant[kind]


def is_roles(mask: torch.Tensor | None, rows: int) -> bool:
    """Return whether a mask is one of roles."""
    return mask is not None and rows >= MIN_ROWS and mask.ndim == 4 and mask.shape[2:] == (1, 2)


def plan_of(roles: torch.Tensor, batch: int, rows: int, keys: int) -> Plan:
    """Read roles. The first layer does, on a GPU with its one synchronisation; the others find the plan."""
    plan: Plan | None = getattr(roles, "_flashprefill_plan", None)
    if plan is None:
        plan = _read(roles)
        roles._flashprefill_plan = plan  # type: ignore[attr-defined]
    if roles.shape[0] != batch or roles.shape[1] != keys or plan.used - plan.first_query != rows:
        raise RuntimeError(
            f"flashprefill's mask was made for {roles.shape[0]} sequences, "
            f"{plan.used - plan.first_query} queries and {roles.shape[1]} keys; "
            f"the layer has {batch}, {rows} and {keys}"
        )
    return plan


def _read(roles: torch.Tensor) -> Plan:
    # One table comes to the host: first, past the last, and how many, of queries and each sequence's tokens.
    flags = torch.cat([roles[:1, :, 0, 1], roles[:, :, 0, 0]]).to(torch.int32)
    table = torch.stack(
        [flags.argmax(1), flags.shape[1] - flags.flip(1).argmax(1), flags.sum(1)], dim=1
    ).tolist()
    (first, used, _), sequences = table[0], table[1:]
    holes = False
    spans: list[Span] = []
    for b, (begin, end, tokens) in enumerate(sequences):
        if tokens == 0:
            continue
        holes = holes or end - begin != tokens
        row_begin, row_end = max(begin, first) - first, min(end, used) - first
        if row_end <= row_begin:
            continue  # nothing but padding among the rows
        if spans and spans[-1][1:] == (b, row_begin, row_end, begin, end):
            spans[-1] = spans[-1]._replace(batch_end=b + 1)
        else:
            spans.append(Span(b, b + 1, row_begin, row_end, begin, end))
    return Plan(first, used, spans, holes, getattr(roles, "_flashprefill_short", False))


def pairs_of(roles: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Return SDPA's mask, bool [batch, 1, rows, keys], for a layer that runs dense."""
    if plan.pairs is None:
        keys = torch.arange(roles.shape[1], device=roles.device)
        causal = keys[None, :] <= keys[plan.first_query : plan.used, None]
        plan.pairs = causal[None, None] & roles[:, None, None, :, 0, 0]
    return plan.pairs


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a bool mask as eager attention wants it: 0, or the dtype's lowest number."""
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)


def causal_pairs(rows: int, keys: int, device: Any) -> torch.Tensor:
    """Return the mask that None stands for, aligned at the first key as SDPA's; eager attention wants one."""
    return torch.ones(1, 1, rows, keys, dtype=torch.bool, device=device).tril()
