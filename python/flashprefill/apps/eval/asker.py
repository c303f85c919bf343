"""Who asks the model: every method of some prompts, unless the answer is on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ...policies import Policy
from .. import models, needles
from . import answers, harness, ruler, suites

if TYPE_CHECKING:
    from .model import FlashPrefillLM, Reading

SLACK = 256  # tokens over RULER's length, for what the answer begins with and a chat template
COUNTED = 3  # on a GPU: prompts of a task and length of which is counted what a policy keeps
WARM_UP = 1024  # tokens
MOST_TOGETHER = 48  # answers that are written as one batch: four prompts by twelve methods
MEMORY_SHARE = 0.3  # of the free memory, for their caches


class Asker:
    """Asks the model, unless the answer is on disk."""

    def __init__(self, options: Any, loaded: models.Loaded, known: answers.Answers, model: str) -> None:
        self.options, self.loaded, self.known, self.model_hash = options, loaded, known, model
        self.library = answers.of_library()
        self.lms: dict[int, FlashPrefillLM] = {}
        self.warm: set[tuple[int, str]] = set()
        self.asked = 0

    def _lm(self, prompt: suites.Prompt) -> FlashPrefillLM:
        """The model for prompts of a length; one is kept, since a stretched model has weights of its own."""
        from .model import FlashPrefillLM

        most = prompt.length + (SLACK if prompt.task in ruler.TASKS else 0)
        if most not in self.lms:
            for lm in self.lms.values():
                lm.use(None)  # the model itself goes on
            self.lms.clear()
            factor = needles.stretch_for(prompt.length, self.loaded.context) if self.options.stretch else 1.0
            self.loaded = models.stretched(self.loaded, factor)
            with harness.quiet():
                self.lms[most] = FlashPrefillLM(
                    pretrained=self.loaded.model,
                    tokenizer=self.loaded.tokenizer,
                    last_token=self.options.last_token,
                    cut="middle",
                    max_gen_toks_limit=self.options.max_tokens,
                    max_length=most,
                    device=self.loaded.device.kind,
                )
        return self.lms[most]

    def key(self, prompt: suites.Prompt, policy: Policy | None) -> str:
        """What an answer depends on."""
        return answers.digest(
            {
                "model": [self.model_hash, self.loaded.dtype, self.loaded.device.kind],
                "stretch": self.options.stretch,
                "policy": None if policy is None else [policy.text, self.options.last_token, self.library],
                "most": [prompt.length, self.options.max_tokens],
                "prompt": prompt.hash,
            }
        )

    def ask(
        self, prompts: Sequence[suites.Prompt], methods: dict[str, Policy | None]
    ) -> Iterator[tuple[suites.Prompt, str, dict[str, Any]]]:
        """Yield every method's answer to prompts of one task, as it is kept on disk: first what is there."""
        rest = []
        for label, policy in methods.items():
            for prompt in prompts:
                key = self.key(prompt, policy)
                record = self.known.get(key)
                if record is None:
                    rest.append((prompt, label, key))
                else:
                    yield prompt, label, record
        if not rest:
            return
        lm = self._lm(prompts[0])
        for label in {label: None for _, label, _ in rest}:
            if (id(lm), label) not in self.warm:
                lm.use(methods[label])
                lm.read_some(WARM_UP)
                self.warm.add((id(lm), label))
        step = self._together(lm, prompts[0])
        for start in range(0, len(rest), step):
            some = rest[start : start + step]
            said = self._answers(lm, [(prompt, methods[label]) for prompt, label, _ in some])
            for (prompt, label, key), (answer, reading) in zip(some, said, strict=True):
                self.asked += 1
                yield prompt, label, self.known.put(key, self._record(prompt, label, answer, reading))

    def _together(self, lm: FlashPrefillLM, prompt: suites.Prompt) -> int:
        """How many answers are written as one batch: as many as their caches have room for."""
        if prompt.requests[0].request_type != "generate_until" or not lm.can_batch:
            return 1
        room = MEMORY_SHARE * self.loaded.device.free_bytes()
        return int(min(MOST_TOGETHER, max(1, room // lm.cache_bytes(lm.max_length))))

    def _counted(self, prompt: suites.Prompt) -> bool:
        return not self.loaded.device.cuda or prompt.index < COUNTED

    def _answers(
        self, lm: FlashPrefillLM, some: Sequence[tuple[suites.Prompt, Policy | None]]
    ) -> list[tuple[list[Any], Reading]]:
        """What is said to prompts by their policies, and what was measured."""
        from .model import Job

        if len(some) > 1:
            jobs = [Job(prompt.requests[0], policy, self._counted(prompt)) for prompt, policy in some]
            return [([answer], reading) for answer, reading in lm.answer_together(jobs)]
        ((prompt, policy),) = some
        lm.use(policy)
        lm.count = self._counted(prompt)
        generating = prompt.requests[0].request_type == "generate_until"
        said = (lm.generate_until if generating else lm.loglikelihood)(prompt.requests, disable_tqdm=True)
        return [(said, lm.reading)]

    def _record(self, prompt: suites.Prompt, label: str, said: list[Any], reading: Reading) -> dict[str, Any]:
        choices = not isinstance(said[0], str)
        best = str(max(range(len(said)), key=lambda choice: said[choice][0])) if choices else said[0]
        return {
            "task": prompt.task,
            "length": prompt.length,
            "index": prompt.index,
            "seed": self.options.seed,
            "policy": label,
            "said": said,
            "text": best,
            "tokens": reading.tokens,
            "cut": reading.cut,
            "ttft_seconds": round(reading.ttft, 5),
            "density": None if reading.density is None else round(reading.density, 5),
            "fallbacks": reading.fallbacks or {},
        }
