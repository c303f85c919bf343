"""The class that lm-eval knows as "flashprefill": its Hugging Face model with a policy for the prefill.

A prompt is read all but its last token by the policy; the last token and the answer are dense, token by
token from the cache, as the harness of FlashPrefill's authors does it. What a policy loses of the prompt is
then in the cache alone, and every token that is written looks at all of it. `last_token="policy"` reads the
whole prompt by the policy, as a server does. Without a policy the model keeps its own attention and writes
what lm-eval's stock class writes.

Four choices that follow one context are scored from one reading of it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from ... import collect_stats, patch_model, unpatch_model
from ...policies import Policy
from .. import device as devices
from .. import measure, models
from ..errors import UsageError
from ..spec import parse_policy
from . import padded

LAST_TOKEN = ("dense", "policy")
CUTS = ("left", "middle")


@dataclass
class Reading:
    """What was measured while one prompt was read."""

    tokens: int
    cut: int  # tokens that were left out because the prompt is longer than the model's context
    ttft: float = 0.0  # seconds from the prompt to the logits of the first token
    density: float | None = 1.0  # None where it was not counted
    fallbacks: dict[str, int] | None = None


@dataclass
class Job:
    """One prompt for one policy: lm-eval's request, and whether what the policy keeps is counted."""

    request: Any
    policy: Policy | None
    count: bool


class FirstToken:
    """A logits processor that changes nothing: it notes when the first logits are there."""

    def __init__(self, device: devices.Device) -> None:
        self.device = device
        self.at: float | None = None

    def __call__(self, _ids: Any, scores: Any) -> Any:
        """Note the time once."""
        if self.at is None:
            self.at = self.device.now()
        return scores


def _policy(value: Any) -> Policy | None:
    if isinstance(value, str):
        return None if value.strip().lower() in ("", "dense", "none") else parse_policy(value)
    if value is not None and not isinstance(value, Policy):
        raise UsageError(
            f"policy {value!r}: must be a policy, a text of one, or None for the model's own attention"
        )
    return value


@register_model("flashprefill")
class FlashPrefillLM(HFLM):
    """lm-eval's Hugging Face model, whose prompts are read by a policy.

    Args:
        pretrained: a folder, a GGUF file, a name on the hub, or a loaded model; None for the packaged one.
        policy: a policy or its text ("sketch(gain=0.0025)"); None or "dense" for the model's own attention.
        last_token: "dense" reads the prompt's last token densely; "policy" leaves it to the policy.
        cut: where a prompt that is longer than the context loses tokens: "left", as lm-eval does, or
            "middle", as InfiniteBench and LongBench v2 do.
        max_gen_toks_limit: no answer is longer, whatever its task allows.
        device, dtype: as on the command line: a GPU where flashprefill runs on one.
        batch_size: 1. Prompts are read one by one.
        more: as for lm-eval's "hf".
    """

    def __init__(
        self,
        pretrained: Any = None,
        policy: Any = None,
        last_token: str = "dense",
        cut: str = "left",
        max_gen_toks_limit: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        **more: Any,
    ) -> None:
        for name, value, known in (("last_token", last_token, LAST_TOKEN), ("cut", cut, CUTS)):
            if value not in known:
                raise UsageError(f"{name}={value!r}: must be one of {', '.join(known)}")
        if str(batch_size) != "1":
            raise UsageError(f"batch_size={batch_size}: must be 1, since prompts are read one by one")
        policy = _policy(policy)
        where = devices.resolve("cpu" if device is not None and "cuda" not in device else "auto", dtype)
        if pretrained is None or (
            isinstance(pretrained, (str, Path)) and Path(pretrained).expanduser().exists()
        ):
            loaded = models.load(None if pretrained is None else Path(pretrained), dtype, where)
            pretrained, more["tokenizer"] = loaded.model, more.get("tokenizer") or loaded.tokenizer
        elif isinstance(pretrained, str):
            more |= {"device": where.kind, "dtype": dtype if dtype == "auto" else models.torch_dtype(dtype)}
        with contextlib.suppress(AttributeError):
            pretrained.eval()
        super().__init__(pretrained=pretrained, backend="causal", batch_size=1, **more)
        self.last_token, self.cut, self.limit = last_token, cut, max_gen_toks_limit
        self.timer = devices.Device(torch.device(self.device).type)
        self.count = True  # whether what is kept is counted; on a GPU that takes a pass of its own
        self.reading = Reading(0, 0)
        self.policy: Policy | None = None
        self.use(policy)

    def use(self, policy: Any) -> None:
        """Read by another policy from here on; None is the model's own attention."""
        policy = _policy(policy)
        if self.policy is not None:
            unpatch_model(self.model)
        self.policy = policy
        if policy is not None:
            patch_model(self.model, policy)

    def read_some(self, tokens: int) -> None:
        """Read some tokens for nothing: threads start, memory is mapped, kernels are loaded."""
        some = min(tokens, max(1, self.max_length - 1))
        self._forward(torch.full((1, some), int(self.eot_token_id or 0), device=self.device))

    # ------------------------------------------------------------ reading

    def _fit(self, ids: torch.Tensor, room: int) -> torch.Tensor:
        """Cut a prompt [1, tokens] that is longer than the room for it, and begin a reading."""
        tokens = ids.shape[1]
        if room < 1:
            raise UsageError(f"the answer leaves no room for a prompt in {self.max_length} tokens of context")
        if tokens > room:
            front = 0 if self.cut == "left" else room // 2
            ids = torch.cat((ids[:, :front], ids[:, tokens - room + front :]), dim=1)
        self.reading = Reading(ids.shape[1], tokens - ids.shape[1])
        return ids.to(self.device)

    def _by_policy(self, ids: torch.Tensor) -> torch.Tensor:
        """The part of a prompt that the policy reads: nothing of it stays to be read if it is one token."""
        return ids[:, :-1] if self.last_token == "dense" else ids

    def _forward(self, ids: torch.Tensor, cache: Any = None, keep: int = 1) -> Any:
        known = {} if cache is None else {measure.cache_keyword(self.model): cache}
        with torch.inference_mode():
            return self.model(input_ids=ids, use_cache=True, logits_to_keep=keep, **known)

    def _cache(self, output: Any) -> Any:
        return output[measure.cache_keyword(self.model)]

    @contextlib.contextmanager
    def _watched(self, ids: torch.Tensor) -> Iterator[None]:
        """Count what the policy keeps: of the block's own forward, on a GPU of one before it."""
        if self.policy is None or not self.count:
            self.reading.density = None if self.policy is not None else 1.0
            yield
            return
        with collect_stats(self.model) as stats:
            if self.timer.cuda:
                self._forward(self._by_policy(ids))
            else:
                yield
        # A layer that ran dense keeps everything.
        density = np.nan_to_num(stats.density, nan=1.0)
        self.reading.density = float(density.mean()) if density.size else 1.0
        self.reading.fallbacks = {why: n for why, n in stats.fallbacks.items() if why != "decode"}
        if self.timer.cuda:
            yield

    def _read(self, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Read a prompt; return the logits after it, fp32 [vocabulary], and its cache."""
        with self._watched(ids):
            start = self.timer.now()
            part = self._by_policy(ids)
            output = self._forward(part) if part.shape[1] else None
            if part.shape[1] < ids.shape[1]:
                output = self._forward(ids[:, -1:], None if output is None else self._cache(output))
            self.reading.ttft = self.timer.now() - start
        assert output is not None
        return output.logits[0, -1].float(), self._cache(output)

    # ------------------------------------------------------------ what lm-eval calls

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer prompts one by one.

        Requests for sampling, and models whose thoughts end with a token's number, are the stock class's.
        """
        from tqdm import tqdm

        answers = []
        for request in tqdm(
            requests, desc="flashprefill: answers", disable=disable_tqdm or len(requests) == 1
        ):
            context, options = request.args
            if options.get("do_sample") or isinstance(self.think_end_token, int):
                answer = super().generate_until([request], disable_tqdm=True)[0]
            else:
                answer = self._answer(context, normalize_gen_kwargs(options, self.max_gen_toks))
            answers.append(answer)
            self.cache_hook.add_partial("generate_until", (context, options), answer)
        return answers

    def _write(
        self,
        ids: torch.Tensor,
        most: int,
        options: dict[str, Any],
        cache: Any = None,
        processors: Any = (),
        mask: torch.Tensor | None = None,
    ) -> list[str]:
        """Continue prompts [batch, tokens], whose beginning may be in a cache; the mask has 0 for padding."""
        stop = handle_stop_sequences(
            options.pop("until", None), eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        )
        if cache is not None:
            options[measure.cache_keyword(self.model)] = cache
        with torch.inference_mode():
            written = self._model_generate(
                context=ids,
                attention_mask=torch.ones_like(ids) if mask is None else mask,
                stop=stop,
                max_length=ids.shape[1] + most,
                logits_processor=list(processors),
                **options,
            )
        texts = [self.tok_decode(row) for row in written[:, ids.shape[1] :].tolist()]
        think = self.think_end_token if isinstance(self.think_end_token, str) else None
        return [
            postprocess_generated_text(generation=text, stop=stop, think_end_token=think) for text in texts
        ]

    def _answer(self, context: str, options: dict[str, Any]) -> str:
        most = options.pop("max_gen_toks")
        most = most if self.limit is None else min(most, self.limit)
        ids = self._fit(self.tok_batch_encode([context])[0], self.max_length - most)
        first = FirstToken(self.timer)
        with self._watched(ids):
            start = self.timer.now()
            part = self._by_policy(ids)
            begun = self._cache(self._forward(part)) if 0 < part.shape[1] < ids.shape[1] else None
            (answer,) = self._write(ids, most, options, begun, [first])
        self.reading.ttft = (first.at or self.timer.now()) - start
        return answer

    def answer_together(self, jobs: Sequence[Job]) -> list[tuple[str, Reading]]:
        """Prompts, each read by its policy one after the other, then answered as one batch.

        Shorter prompts are padded on the left. What is written is dense for all, and a step of the batch
        takes little more than a step of one. Only where the last token is dense, for caches without sliding
        windows, and for prompts of one task, whose answers end alike.
        """
        options = normalize_gen_kwargs(jobs[0].request.args[1], self.max_gen_toks)
        most = options.pop("max_gen_toks")
        most = most if self.limit is None else min(most, self.limit)
        asked, readings = [], []
        for job in jobs:
            asked.append(self._fit(self.tok_batch_encode([job.request.args[0]])[0], self.max_length - most))
            readings.append(self.reading)
        longest = max(ids.shape[1] for ids in asked)
        merged: Any = None
        counted = self.count
        for row, (job, ids) in enumerate(zip(jobs, asked, strict=True)):
            self.use(job.policy)
            self.reading, self.count = readings[row], job.count
            cache = self._read(ids)[1]
            merged = merged or padded.Rows(cache, len(jobs), longest - 1)
            merged.put(row, cache, ids.shape[1] - 1)  # the last token is read again, by the batch
        self.use(None)
        self.count = counted
        batch, mask = padded.left(asked, longest, int(self.eot_token_id or 0))
        with padded.attention(self.model):
            texts = self._write(batch, most, options, merged.cache(), mask=mask)
        return list(zip(texts, readings, strict=True))

    @functools.cached_property
    def can_batch(self) -> bool:
        """Whether answer_together may be called: one kind of cache layer can be put side by side."""
        if self.last_token != "dense":
            return False
        with torch.inference_mode():
            cache = self._cache(self._forward(torch.zeros((1, 2), dtype=torch.long, device=self.device)))
        return all(type(layer).__name__ == "DynamicLayer" for layer in getattr(cache, "layers", [None]))

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the cache of a prompt."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * dim * tokens * self.model.dtype.itemsize)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-probability of a continuation, whether it is the most likely one) of each request.

        Requests with one context are answered from one reading of it.
        """
        from tqdm import tqdm

        groups: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, _) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(number)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for context, members in tqdm(
            groups.items(), desc="flashprefill: contexts", disable=disable_tqdm or len(groups) == 1
        ):
            longest = max(len(requests[number][2]) for number in members)
            ids = self._fit(torch.tensor([context]), self.max_length + 1 - longest)
            logits, cache = self._read(ids)
            for number in members:
                text, _, continuation = requests[number]
                answers[number] = self._likelihood(logits, cache, continuation)
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, answers[number])
        return answers

    def _likelihood(self, logits: torch.Tensor, cache: Any, continuation: list[int]) -> tuple[float, bool]:
        """A continuation's log-probability after a reading, whose cache stays as it is."""
        rows = logits[None]
        if len(continuation) > 1:
            ids = torch.tensor([continuation[:-1]], device=self.device)
            output = self._forward(ids, copy.deepcopy(cache), keep=len(continuation) - 1)
            rows = torch.cat((rows, output.logits[0].float()))
        wanted = torch.tensor(continuation, device=self.device)
        sure = torch.log_softmax(rows, dim=-1).gather(1, wanted[:, None]).sum()
        return float(sure), bool((rows.argmax(dim=-1) == wanted).all())
