"""Registration: what Transformers has to know so that ``attn_implementation="flashprefill"`` works.

AttentionInterface and AttentionMaskInterface are made for this. One thing is in the way: Transformers takes
every name with "flash" in it for a relative of FlashAttention. It would fetch a kernel of that name from
the hub, refuse static caches, and hand packed sequences to vision towers. So models store another name,
``sparse_prefill``, and the name that people write is translated to it in the two methods through which each
name passes.

Four more methods are wrapped. GenerationMixin._prefill, for what no layer can know: generate() alone knows
whether a chunk is its prompt's last. PreTrainedModel.post_init, so that a model made from a patched model's
config is not patched, and set_attn_implementation, so that configs know it after a change there and back. And
continuous batching's choice of an attention, which knows the names of Transformers' own only.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from .attention import flashprefill_attention, prompt_length
from .configs import leave_patched_configs, links_of, mark
from .fallback import warn_once
from .masks import flashprefill_mask

NAME = "flashprefill"
IMPLEMENTATION = "sparse_prefill"


def register_transformers() -> None:
    """Register with Transformers. ``import flashprefill`` does it; calling it again changes nothing."""
    if IMPLEMENTATION in AttentionInterface._global_mapping:
        return
    for name in (NAME, IMPLEMENTATION):
        AttentionInterface.register(name, flashprefill_attention)
        AttentionMaskInterface.register(name, flashprefill_mask)
    for method in ("_check_and_adjust_attn_implementation", "get_correct_attn_implementation"):
        _translate(method)
    _mark_again()
    _leave_patched_configs()
    _tell_prompt_length()
    _allow_continuous_batching()


def _translate(name: str) -> None:
    method = getattr(PreTrainedModel, name)

    @functools.wraps(method)
    def translated(self: Any, implementation: str | None, *args: Any, **kwargs: Any) -> str:
        known = IMPLEMENTATION if implementation == NAME else implementation
        return method(self, known, *args, **kwargs)  # type: ignore[no-any-return]

    setattr(PreTrainedModel, name, translated)


def _mark_again() -> None:
    method = PreTrainedModel.set_attn_implementation

    @functools.wraps(method)
    def set_and_mark(self: Any, *args: Any, **kwargs: Any) -> None:
        method(self, *args, **kwargs)
        mark(links_of(self), IMPLEMENTATION)

    PreTrainedModel.set_attn_implementation = set_and_mark  # type: ignore[method-assign]


def _leave_patched_configs() -> None:
    post_init: Any = PreTrainedModel.post_init

    @functools.wraps(post_init)
    def post_init_unpatched(self: Any, *args: Any, **kwargs: Any) -> Any:
        leave_patched_configs(self)
        return post_init(self, *args, **kwargs)

    PreTrainedModel.post_init = post_init_unpatched  # type: ignore[method-assign]


def _allow_continuous_batching() -> None:
    try:
        from transformers.generation.continuous_batching import ContinuousBatchingManager

        switch = ContinuousBatchingManager.switch_to_cb_friendly_attn
    except (ImportError, AttributeError):  # another version of Transformers, with its own rules
        return

    @functools.wraps(switch)
    def switch_or_stay(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        name = model.config._attn_implementation
        if name != IMPLEMENTATION:
            return switch(self, model, *args, **kwargs)
        if model.device.type == "cpu":
            return None  # packed.py runs over its cache
        warn_once("paged cache", model)  # CUDA graphs leave no place to read lengths
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        switch(self, model, *args, **kwargs)
        self._original_attn_impl = IMPLEMENTATION  # what is set again at the end
        return None

    ContinuousBatchingManager.switch_to_cb_friendly_attn = switch_or_stay  # type: ignore[method-assign]


def _tell_prompt_length() -> None:
    prefill = GenerationMixin._prefill

    @functools.wraps(prefill)
    def prefill_with_length(
        self: Any, input_ids: Any, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        mask = model_kwargs.get("attention_mask")
        length = getattr(generation_config, "_mask_length", -1)  # of a mask without padding, which is dropped
        if mask is not None and mask.ndim == 2:
            length = mask.shape[1]
        token = prompt_length.set(length if length > 0 else None)
        try:
            return prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            prompt_length.reset(token)

    GenerationMixin._prefill = prefill_with_length  # type: ignore[method-assign]
