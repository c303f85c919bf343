"""train-adapter's order of work: make sequences, learn, look now and then how far needles are found; save.

Everything is plain PyTorch: the model of Transformers with its own attention (scaled_dot_product_attention,
which on a GPU is FlashAttention), AdamW, bf16 weights that stay as they are, fp32 factors.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import checks, corpus, device, machine, models, prompt
from ..errors import UsageError
from . import lora, tasks

SCHEMA = "flashprefill-adapter/1"
SAVE_EVERY = 60.0  # seconds
TEXT_TOKENS = 1 << 20  # of text that sequences are cut from, at most
WARM_UP, HOLD, LEAST_RATE = 0.03, 0.6, 0.05  # shares of the run, and of the rate
TEXT_POSITIONS, TEXT_WEIGHT = 512, 0.1  # of each step the text's own next tokens are learnt too
CLIP = 1.0  # norm of the gradients
LEAST_LENGTH = 512  # tokens: below, a question and its facts have no room


@dataclass
class Options:
    """The command line's options."""

    model: Path | None = None
    text: Path | None = None
    tokens: int = 32768
    batch: int = 32768
    minutes: float | None = 25.0
    steps: int = 20000
    base: float | None = None
    rank: int = 16
    alpha: float = 32.0
    rate: float = 1e-3
    needles: int = 10
    checkpoint: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    resume: bool = False
    out: Path = Path("out/adapter")


# What must be the same for a run to go on.
SAME = ("tokens", "batch", "minutes", "steps", "base", "rank", "alpha", "rate", "seed")


def check(options: Options) -> None:
    """Refuse what argparse cannot know."""
    for name in ("batch", "steps", "rank"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.tokens < LEAST_LENGTH:
        raise UsageError(f"--tokens {options.tokens}: must be at least {LEAST_LENGTH}")
    if options.needles < 0:
        raise UsageError(f"--needles {options.needles}: must be at least 0")
    for name in ("rate", "alpha", "minutes", "base"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name} {value:g}: must be above 0")
    checks.can_make(options.out)
    checks.can_run(options.model, options.device, options.dtype)
    if options.resume and not state_file(options.out).is_file():
        raise UsageError(f"--resume: there is no {state_file(options.out)} of an earlier run")


def state_file(out: Path) -> Path:
    """Where a run leaves what `--resume` goes on from."""
    return out / "resume.pt"


def base_for(own: lora.Reach, tokens: int) -> float:
    """The rotary base by default: scaled as far again as the context, and as much once more.

    The slowest rotation then turns about half as far over the new context as it did over the old one.
    """
    return own.rope_theta * max(1.0, 2.0 * tokens / own.context)


def rate_at(progress: float) -> float:
    """The learning rate as a share of its peak: up, level, then a cosine down."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, 0.05)
    if progress < HOLD:
        return 1.0
    share = min(1.0, (progress - HOLD) / (1.0 - HOLD))
    return LEAST_RATE + (1.0 - LEAST_RATE) * (1.0 + math.cos(math.pi * share)) / 2.0


def length_at(progress: float, draw: random.Random, tokens: int) -> int:
    """How long the sequences of a step are: short ones first, then half of the steps the whole length."""
    shares = (0.0, 0.2, 0.8) if progress < 0.1 else (0.2, 0.5, 0.3) if progress < 0.25 else (0.5, 0.3, 0.2)
    divisor = draw.choices((1, 2, 4), shares)[0]
    return max(min(tokens, LEAST_LENGTH), tokens // divisor)


class Run:
    """A model with its adapter, the optimiser, and how far it is."""

    def __init__(self, options: Options, loaded: models.Loaded) -> None:
        self.options, self.loaded, self.model = options, loaded, loaded.model
        own = lora.reach_of(self.model.config)
        base = options.base or base_for(own, options.tokens)
        self.reach = lora.Reach(base, max(options.tokens, own.context))
        lora.set_reach(self.model, self.reach)
        self.added = lora.add(self.model, options.rank, options.alpha, options.seed)
        if options.checkpoint:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        parameters = [part for layer in self.added.values() for part in (layer.A, layer.B)]
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=options.rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.step_number, self.seconds, self.tokens_seen = 0, 0.0, 0

    @property
    def progress(self) -> float:
        """From 0 to 1, by steps or by time, whichever is further."""
        by_steps = self.step_number / self.options.steps
        by_time = self.seconds / (60.0 * self.options.minutes) if self.options.minutes else 0.0
        return max(by_steps, by_time)

    def forward(self, ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Logits [batch, kept, vocabulary] after the positions `keep`."""
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
        return logits

    def step(self, maker: tasks.Maker) -> dict[str, float]:
        """Learn from as many sequences as a step has tokens for; returns what the log says."""
        options, begin = self.options, time.monotonic()
        draw = random.Random(f"{options.seed}/{self.step_number}")
        length = length_at(self.progress, draw, options.tokens)
        made = [maker.make(draw, length) for _ in range(max(1, options.batch // length))]
        where = self.loaded.device.kind
        ids = torch.stack([torch.from_numpy(one.ids) for one in made]).to(where)
        learnt = torch.stack([torch.from_numpy(one.learnt) for one in made])
        text = torch.tensor(sorted(draw.sample(range(1, length), min(TEXT_POSITIONS, length // 4))))
        used = learnt.any(dim=0)
        used[text] = True
        after = used.nonzero()[:, 0]  # ids that are predicted, by the positions before them
        answers = learnt[:, after].to(where)
        after = after.to(where)
        rate = rate_at(self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = options.rate * rate
        logits = self.forward(ids, after - 1)
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), ids[:, after].flatten(), reduction="none"
        ).view_as(answers)
        answer_loss = losses[answers].mean()
        text_loss = losses[~answers].mean()
        (answer_loss + TEXT_WEIGHT * text_loss).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        self.tokens_seen += ids.numel()
        log = {"loss": answer_loss.item(), "text": text_loss.item(), "norm": norm.item(), "length": length}
        log |= {"rate": options.rate * rate, "step": self.step_number, "tokens": self.tokens_seen}
        self.seconds += time.monotonic() - begin
        return log | {"seconds": round(self.seconds, 2)}

    @torch.no_grad()
    def find(self, maker: tasks.Maker, tokens: int, count: int) -> list[bool]:
        """Whether each of `count` needles is found by greedy decoding in a text it has not learnt from.

        The answer is given and every one of its ids must be the most likely one: then it is what greedy
        decoding writes.
        """
        found = []
        for number in range(count):
            draw = random.Random(f"needle/{tokens}/{number}")
            made = maker.filled(draw, tokens, tasks.single(draw), (number + 0.5) / count)
            ids = torch.from_numpy(made.ids).to(self.loaded.device.kind)
            after = torch.from_numpy(made.learnt).nonzero()[:, 0].to(ids.device)
            best = self.forward(ids[None], after - 1)[0].argmax(dim=-1)
            found.append(bool((best == ids[after]).all()))
        return found

    def save(self) -> None:
        """Write the adapter, and what `--resume` needs."""
        options = self.options
        lora.save(options.out, self.added, options.alpha, self.reach, self.loaded.name)
        state = {
            "options": {name: getattr(options, name) for name in SAME},
            "factors": {name: (layer.A.detach(), layer.B.detach()) for name, layer in self.added.items()},
            "optimizer": self.optimizer.state_dict(),
            "progress": [self.step_number, self.seconds, self.tokens_seen],
        }
        temporary = state_file(options.out).with_suffix(".new")
        torch.save(state, temporary)
        temporary.replace(state_file(options.out))

    @torch.no_grad()
    def resume(self) -> None:
        """Go on from the state of an earlier run, if it had the same options."""
        state = torch.load(state_file(self.options.out), map_location="cpu", weights_only=True)
        for name in SAME:
            had, has = state["options"].get(name), getattr(self.options, name)
            if had != has:
                raise UsageError(f"--{name} {has}: the run to go on with had {had}")
        if sorted(state["factors"]) != sorted(self.added):
            raise UsageError("--model: the run to go on with had another")
        for name, (a, b) in state["factors"].items():
            self.added[name].A.copy_(a)
            self.added[name].B.copy_(b)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_number, self.seconds, self.tokens_seen = state["progress"]


def unseen_ids(tokenizer: Any) -> list[int]:
    """Ids of the texts that are not learnt from, for the needles that are counted."""
    ids: list[int] = []
    for name, text in prompt.local_texts():
        if name.startswith(corpus.LIKE_THE_LABS) or name == corpus.HELD_OUT:
            ids += tokenizer(text.strip() + "\n\n", add_special_tokens=False)["input_ids"]
    if not ids:
        raise UsageError(
            "found none of the texts on this machine that needles are looked for in; or --needles 0"
        )
    return ids


def lengths_of(options: Options) -> list[int]:
    """Where needles are counted: the length that is trained for, half and a quarter of it."""
    return sorted({max(LEAST_LENGTH, options.tokens // divisor) for divisor in (1, 2, 4)})


def count_needles(state: Run, maker: tasks.Maker | None) -> dict[str, int]:
    """Needles found by length."""
    if maker is None:
        return {}
    options = state.options
    state.model.eval()
    found = {str(n): sum(state.find(maker, n, options.needles)) for n in lengths_of(options)}
    state.model.train()
    words = ", ".join(f"{count} of {options.needles} at {n}" for n, count in found.items())
    print(f"step {state.step_number}: needles found: {words}", file=sys.stderr, flush=True)
    return found


def train(state: Run, maker: tasks.Maker, judge: tasks.Maker | None) -> list[dict[str, Any]]:
    """All steps, with a bar; returns the needles that were found, at the beginning and at each save."""
    from tqdm import tqdm

    options = state.options
    log = (options.out / "log.jsonl").open("a" if options.resume else "w", encoding="utf-8")
    found: list[dict[str, Any]] = [{"step": state.step_number, "needles": count_needles(state, judge)}]
    last = state.seconds
    form = "{desc} {percentage:3.0f}% {bar} [{elapsed}]"
    with log, tqdm(total=100.0, desc="adapter", bar_format=form, disable=None) as bar:
        while state.progress < 1.0:
            said = state.step(maker)
            log.write(json.dumps(said) + "\n")
            log.flush()
            bar.set_description(f"step {state.step_number}, loss {said['loss']:.3f}")
            bar.update(100.0 * min(1.0, state.progress) - bar.n)
            if state.seconds - last > SAVE_EVERY or state.progress >= 1.0:
                state.save()
                found.append({"step": state.step_number, "needles": count_needles(state, judge)})
                last = state.seconds
    return found


def run(options: Options) -> dict[str, Any]:
    """Train; returns what is written beside the adapter as JSON."""
    check(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    where = device.resolve(options.device, options.dtype)
    loaded = models.load(options.model, options.dtype, where)
    texts = corpus.Texts(loaded.tokenizer, corpus.texts(options.text), 1024, TEXT_TOKENS)
    print(f"{len(texts.ids)} tokens of {len(texts.names)} texts", file=sys.stderr, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    state = Run(options, loaded)
    if options.resume:
        state.resume()
    loaded.model.train()
    judge = tasks.maker_of(loaded.tokenizer, unseen_ids(loaded.tokenizer)) if options.needles else None
    found = train(state, tasks.maker_of(loaded.tokenizer, texts.ids), judge)
    results = {
        "schema": SCHEMA,
        **machine.describe(where.facts()),
        "model": loaded.name,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "rope_theta": state.reach.rope_theta,
        "context": state.reach.context,
        "texts": len(texts.names),
        "steps": state.step_number,
        "tokens": state.tokens_seen,
        "seconds": round(state.seconds, 1),
        "bytes": (options.out / lora.WEIGHTS).stat().st_size,
        "needles": found,
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out}/: {lora.WEIGHTS}, {lora.CONFIG}, results.json, log.jsonl", flush=True)
    return results
