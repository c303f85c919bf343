"""Transformers: a model's long prompts are read by all ranks together.

    torchrun --nproc-per-node 8 program.py       # in which each process has the whole model on its GPU, and
    fp.distributed.patch_model(model, policy)    # calls model.generate(...) or model(...) with the same ids

In a forward over a long prompt each rank embeds, projects and attends to its own rows. Attention goes through
call.py, every other layer sees fewer rows and knows nothing. In the end every rank has what one process would
have: hidden states of all rows (or only of the last, where only its logits are wanted), and a cache with all
keys and values. So generation goes on as always, each rank doing the same; short prompts and decode steps are
not divided.
"""

from __future__ import annotations

import functools
import inspect
import math
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers.cache_utils import DynamicCache

from .._layout import TILE_ROWS, tile_tokens_of
from ..errors import UnsupportedError, refuse, refuse_type, shown
from ..policies import Dense, Policy
from ..transformers import patch as local
from ..transformers import stats
from ..transformers.attention import ATTRIBUTE, Layer, over_ranks, prompt_length
from ..transformers.fallback import LOUD
from ..transformers.reasons import as_sdpa_casts, describe, why_never
from .call import prefill_attention
from .shards import Shards
from .zigzag import Zigzag


@dataclass
class _Door:
    """What a patched model's hooks need to know.

    Attributes:
        shards: the class that divides prompts.
        group: the process group.
        unit: rows; prompts are cut at multiples of it.
        dense: the policy of layers that have none.
        min_tokens: shorter prompts are read by each rank alone.
        signature: of the decoder's forward.
        keep: logits_to_keep of the forward that is under way.
    """

    shards: type[Shards]
    group: Any
    unit: int
    dense: Policy
    min_tokens: int
    signature: inspect.Signature
    keep: Any = 0

    def __deepcopy__(self, _: Any) -> _Door:
        return self  # a copy of the model belongs to the same ranks


@dataclass
class _Forward:
    """A forward over the rows of one rank, as its attention layers see it."""

    door: _Door
    decoder: Any
    shards: Shards
    cache: Any  # the caller's, which has the prefix; or None
    use_cache: bool  # it also gets the keys and values of all ranks
    final: bool
    as_tuple: bool
    layers: int = 0  # that have been computed
    token: Any = None

    def attention(
        self,
        module: Any,
        tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        layer: Layer | None,
        dropout: float,
        scaling: float | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Compute a layer of q, k, v [prompts, heads, rows, head_dim]; out is [prompts, rows, heads, ...]."""
        number = module.layer_idx
        reason = why_never(module, tensors, dropout, kwargs)
        window = kwargs.get("sliding_window")
        if reason is None and window is not None and self.shards.tokens[0] + self.shards.prefix[0] > window:
            reason = "sliding window"
        if reason is not None:
            raise UnsupportedError(
                f"layer {number} of {type(module).__name__} can't be computed over several ranks because of "
                f"this: {LOUD[reason]} ({describe(tensors)})"
            )
        policy: Policy = self.door.dense if layer is None or layer.policy is None else layer.policy
        q, k, v = (x.transpose(1, 2) for x in as_sdpa_casts(tensors))
        recorders = stats.recorders_of(module)
        begin = time.perf_counter()
        result = prefill_attention(
            q, k, v, policy, shards=self.shards, prefix=self._prefix(number), softmax_scale=scaling,
            final_chunk=self.final, return_stats=bool(recorders),
        )  # fmt: skip
        out: torch.Tensor = result[0] if recorders else result
        for recorder in recorders:
            seconds = time.perf_counter() - begin
            outcome = [stats.Measured(result[1], 0.0, 0.0)]
            recorder.add(module, q.shape[1], self.shards.tokens[0], q.shape[2], seconds, outcome)
        if self.use_cache:
            keys, values = self.shards.keys_values(k, v)
            self.cache.update(keys.transpose(1, 2), values.transpose(1, 2), number)
        self.layers += 1
        return out

    def _prefix(self, number: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the keys and values that a layer has in the cache."""
        past = self.shards.prefix[0]
        if past == 0:
            return None
        held = self.cache.layers[number]
        return held.keys[:, :, :past].transpose(1, 2), held.values[:, :, :past].transpose(1, 2)


def patch_model(
    model: Any,
    policy: Any = "flashprefill",
    options: Mapping[str, Any] | None = None,
    *,
    group: Any = None,
    layout: type[Shards] = Zigzag,
    min_tokens: int | None = None,
) -> Any:
    """Make a loaded model read long prompts over all ranks of a process group, sparsely.

    Each rank has the whole model and calls it with the same arguments, under ``torch.inference_mode()`` or
    ``torch.no_grad()``: ``model(...)``, or ``model.generate(...)``, greedily or with equal seeds. Prompts
    may continue a cache. Batches must be without padding. Results are on every rank; where only the last
    logits are wanted (``logits_to_keep=1``, as in ``generate``) only those are computed.

    Args:
        model: a text model of Transformers, on this rank's device.
        policy: as in :func:`flashprefill.patch_model`: a policy, a text of one, or a mapping from layer to
            either.
        options: with a text: fields of the policy.
        group: the process group; the default is torch.distributed's.
        layout: :class:`Zigzag`, or :class:`Ulysses`.
        min_tokens: shorter prompts, and decode steps, are computed by each rank alone. The default is a query
            tile for each of the 2 x ranks chunks.

    Returns:
        The model.

    Raises:
        InvalidArgumentError, ArgumentTypeError: as :func:`flashprefill.patch_model`.
        UnsupportedError: there is no process group, or the model is no text decoder. A forward raises it for
            padding, sliding windows shorter than the prompt, softcapping, attention sinks, gradients, and
            outputs of single layers.
    """
    if not dist.is_initialized():
        raise UnsupportedError(
            "torch.distributed has no process group: start the program with torchrun, and call "
            "torch.distributed.init_process_group first"
        )
    if not (isinstance(layout, type) and issubclass(layout, Shards)):
        refuse_type("layout", shown(layout), "Zigzag or Ulysses")
    inner = local._model(model)
    get_decoder = getattr(inner, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else inner
    if decoder is None or getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise UnsupportedError(f"{type(inner).__name__} is no text decoder")
    local.patch_model(model, policy, options)
    _close(inner, decoder)
    unit, dense = _unit(decoder)
    least = 2 * dist.get_world_size(group) * unit
    if min_tokens is not None:
        if isinstance(min_tokens, bool) or not isinstance(min_tokens, int):
            refuse_type("min_tokens", shown(min_tokens), "an integer")
        if min_tokens < least:
            refuse("min_tokens", min_tokens, f"at least {least}: {unit} rows for each of two chunks per rank")
    door = _Door(layout, group, unit, dense, min_tokens or least, inspect.signature(decoder.forward))
    if inner is not decoder:
        note = functools.partial(_note_logits, door, inspect.signature(inner.forward))
        inner.register_forward_pre_hook(note, with_kwargs=True)
    decoder.register_forward_pre_hook(functools.partial(_enter, door), with_kwargs=True)
    decoder.register_forward_hook(functools.partial(_leave, door), with_kwargs=True, always_call=True)
    return model


def unpatch_model(model: Any) -> Any:
    """Undo patch_model: the model reads prompts by itself, densely.

    Args:
        model: a model that patch_model has patched.

    Returns:
        The model.
    """
    inner = local._model(model)
    get_decoder = getattr(inner, "get_decoder", None)
    _close(inner, get_decoder() if get_decoder is not None else inner)
    return local.unpatch_model(model)


def _close(*modules: Any) -> None:
    """Take an earlier patch's hooks away."""
    for module in modules:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, functools.partial) and hook.func in (_note_logits, _enter, _leave):
                    del hooks[key]


def _unit(decoder: Any) -> tuple[int, Policy]:
    """Return rows at whose multiples prompts may be cut for every layer, and a policy for dense layers."""
    units, shared = [], False
    for module in decoder.modules():
        layer: Layer | None = vars(module).get(ATTRIBUTE)
        if layer is not None and layer.policy is not None:
            group = int(getattr(module, "num_key_value_groups", 1))
            units += [tile_tokens_of(layer.policy.share_heads, group), layer.policy._row_unit() or 1]
            shared = shared or layer.policy.share_heads
    return math.lcm(*(units or [TILE_ROWS])), Dense(share_heads=shared)


def _note_logits(
    door: _Door, signature: inspect.Signature, _: Any, args: Any, kwargs: dict[str, Any]
) -> None:
    """Remember which rows' logits are wanted."""
    given = signature.bind_partial(*args, **kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    wanted = given.get("logits_to_keep", 0)
    door.keep = wanted if isinstance(wanted, int) and given.get("labels") is None else 0


def _enter(door: _Door, decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Before a decoder's forward: give it this rank's rows, if there are enough of them."""
    given = door.signature.bind(*args, **kwargs).arguments
    given = {**given, **given.pop("kwargs", {})}
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    x = ids if embeds is None else embeds
    if x is None or x.shape[1] < door.min_tokens or torch.compiler.is_compiling():
        return None
    tokens, name = x.shape[1], _cache_name(door)
    cache = given.pop(name, None)
    cache = given.pop("past_key_values", None) if cache is None else cache
    past = int(cache.get_seq_length()) if cache is not None else 0
    for output in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if given.get(output):
            raise UnsupportedError(f"{output}=True: each rank would have those of its own rows")
    _refuse_padding(given.pop("attention_mask", None), past + tokens)
    use_cache = given.pop("use_cache", None)
    use_cache = bool(getattr(decoder.config, "use_cache", True) if use_cache is None else use_cache)
    if use_cache and cache is None:
        cache = DynamicCache(config=decoder.config)
    shards = door.shards([tokens] * x.shape[0], door.group, prefix=[past] * x.shape[0], unit=door.unit)
    _agree_on_prompt(shards, ids)
    final, as_tuple = given.pop("final_chunk", None), given.pop("return_dict", None) is False
    if final is None:
        length = prompt_length.get()
        final = length is None or past + tokens >= length
    state = _Forward(door, decoder, shards, cache, use_cache, bool(final), as_tuple)
    here = {**_sharded(given, shards, past, x), "use_cache": False, name: None, "return_dict": True}
    state.token = over_ranks.set(state.attention)
    return (), here


def _leave(door: _Door, decoder: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """After a decoder's forward, also one that failed: bring the ranks' results together."""
    state = getattr(over_ranks.get(), "__self__", None)
    if not isinstance(state, _Forward) or state.decoder is not decoder:
        return None
    over_ranks.reset(state.token)
    if output is None:
        return None
    if not state.layers:
        raise UnsupportedError(
            f"{type(decoder).__name__} has no attention that Transformers asks flashprefill for"
        )
    hidden = output.last_hidden_state
    output.last_hidden_state = (
        state.shards.last(hidden)[:, None] if door.keep == 1 else state.shards.join(hidden)
    )
    if state.use_cache:
        output[_cache_name(door)] = state.cache
    return output.to_tuple() if state.as_tuple else output


def _cache_name(door: _Door) -> str:
    """Return what this version of Transformers calls a model's cache."""
    return "cache" if "cache" in door.signature.parameters else "past_key_values"


def _sharded(given: dict[str, Any], shards: Shards, past: int, x: torch.Tensor) -> dict[str, Any]:
    """Return the decoder's arguments for this rank's rows."""
    result = dict(given)
    for key in ("input_ids", "inputs_embeds"):
        if result.get(key) is not None:
            result[key] = shards.shard(result[key])
    row = shards.positions(x.device)[: shards.rows // x.shape[0]]
    positions = result.pop("position_ids", None)
    result["position_ids"] = row[None] if positions is None else positions[..., row - past]
    result.pop("cache_position", None)
    # Four axes: handed on as it is. A shape that can't be taken for a mask of pairs.
    result["attention_mask"] = torch.zeros(1, 1, 1, 2, dtype=torch.bool, device=x.device)
    return result


def _agree_on_prompt(shards: Shards, ids: torch.Tensor | None) -> None:
    """Refuse prompts that differ between ranks: each would read a mixture of them."""
    check = None if ids is None else zlib.crc32(ids.contiguous().cpu().numpy().tobytes())
    mine = {**shards.described(), "input_ids": check}
    everyone: list[Any] = [None] * shards.ranks
    dist.all_gather_object(everyone, mine, group=shards.group)
    for rank, theirs in enumerate(everyone):
        for what, value in everyone[0].items():
            if theirs[what] != value:
                shown, must = ("not rank 0's", "the same") if what == "input_ids" else (theirs[what], value)
                refuse(f"{what} of rank {rank}", shown, f"{must} on all ranks")


def _refuse_padding(mask: Any, tokens: int) -> None:
    """Refuse a mask that says anything but that every token counts."""
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[1] != tokens:
        what = tuple(mask.shape) if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        raise UnsupportedError(
            f"attention_mask is {what}; over several ranks it must be None or (prompts, {tokens})"
        )
    if bool(mask.all()):
        return
    raise UnsupportedError(
        "attention_mask has padding; over several ranks prompts of a batch must have equal lengths: read "
        "them one by one"
    )
