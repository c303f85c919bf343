"""train-indexer's order of work: read a sequence, learn from it and the pool; save now and then."""

from __future__ import annotations

import json
import random
import sys
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...policies.indexer import Indexer
from .. import checks, corpus, device, machine, models
from ..errors import UsageError
from .harvest import TARGETS, Harvest, read
from .trainer import KINDS, Trainer

SCHEMA = "flashprefill-indexer/1"
SAVE_EVERY = 30.0  # seconds
GPU_SHARE = 0.5  # of a GPU's free memory, for the sequences of the pool
HELD_OUT_TOKENS = 4096
LENGTHS = (1.0, 0.5, 0.25)  # of a sequence, by turns, as shares of --tokens


@dataclass
class Options:
    """The command line's options."""

    model: Path | None = None
    text: Path | None = None
    held_out: Path | None = None
    tokens: int = 8192
    sequences: int = 200
    steps: int = 2000
    hidden: int = 256
    layers: tuple[int, ...] = ()
    rate: float = 1e-3
    kl: str = "forward"
    targets: str = "far"
    pool: int = 8
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    resume: bool = False
    out: Path = Path("indexer.safetensors")


# What must be the same for a run to go on.
SAME = ("tokens", "sequences", "steps", "hidden", "rate", "kl", "targets", "pool", "seed")


def check(options: Options) -> None:
    """Refuse what argparse cannot know."""
    for name in ("sequences", "steps", "hidden", "pool"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.tokens < 64:
        raise UsageError(f"--tokens {options.tokens}: must be at least 64")
    if not 0 < options.rate < 1:
        raise UsageError(f"--rate {options.rate}: must be above 0 and below 1")
    if options.kl not in KINDS:
        raise UsageError(f"--kl {options.kl}: must be one of {', '.join(KINDS)}")
    if options.targets not in TARGETS:
        raise UsageError(f"--targets {options.targets}: must be one of {', '.join(TARGETS)}")
    checks.can_write(options.out, (".safetensors",))
    checks.can_run(options.model, options.device, options.dtype)
    if options.resume and not state_file(options.out).is_file():
        raise UsageError(f"--resume: there is no {state_file(options.out)} of an earlier run")


def state_file(out: Path) -> Path:
    """Where a run leaves what `--resume` goes on from."""
    return out.with_name(out.stem + ".resume.pt")


def rope_theta(config: Any) -> float | None:
    """The rotary base of a model, if it has one."""
    rope = getattr(config, "rope_parameters", None)
    theta = rope.get("rope_theta") if isinstance(rope, dict) else getattr(config, "rope_theta", None)
    return None if theta is None else float(theta)


class Pool:
    """The sequences that were read last, by number.

    What a sequence is depends on its number alone: a run that goes on after a stop reads what it would have.
    """

    def __init__(
        self, loaded: models.Loaded, texts: corpus.Texts, layers: list[int], options: Options
    ) -> None:
        self.loaded, self.texts, self.layers, self.options = loaded, texts, layers, options
        self.kept: OrderedDict[int, Harvest] = OrderedDict()
        self.store = None if self.bytes() < GPU_SHARE * loaded.device.free_bytes() else "cpu"

    def bytes(self) -> int:
        """What all sequences of the pool take: keys, values and fp32 masses of every layer."""
        config = self.loaded.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = heads * (2 * dim * self.loaded.model.dtype.itemsize + 2 * 4)
        return int(per_token * len(self.layers) * self.options.tokens * self.options.pool)

    def at(self, number: int) -> Harvest:
        """A sequence, read now if it is not there; the oldest makes room."""
        if number not in self.kept:
            tokens = int(self.options.tokens * LENGTHS[number % len(LENGTHS)])
            ids = self.texts.cut(number, self.options.seed, tokens)
            self.kept[number] = read(self.loaded, ids, self.layers, self.store, self.options.targets)
            while len(self.kept) > self.options.pool:
                self.kept.popitem(last=False)
        return self.kept[number]

    def for_step(self, step: int) -> Harvest:
        """The sequence of a step: a new one when its turn has come, else one of the pool."""
        options = self.options
        newest = step * options.sequences // options.steps
        if newest not in self.kept:
            return self.at(newest)
        oldest = max(0, newest - options.pool + 1)
        return self.at(random.Random(f"{options.seed}:{step}").randint(oldest, newest))


def save(trainer: Trainer, options: Options, loaded: models.Loaded, texts: corpus.Texts) -> None:
    """Write the weights, and what `--resume` needs."""
    notes = {
        "trained_on": ", ".join(texts.names)[:2000],
        "training": json.dumps({name: getattr(options, name) for name in SAME}),
        "step": str(trainer.step_number),
    }
    theta = rope_theta(loaded.model.config.get_text_config())
    Indexer(trainer.weights(), loaded.name, theta, notes).save(options.out)
    temporary = state_file(options.out).with_suffix(".new")
    torch.save({"options": {name: getattr(options, name) for name in SAME}, **trainer.state()}, temporary)
    temporary.replace(state_file(options.out))


def resume(trainer: Trainer, options: Options) -> None:
    """Go on from the state of an earlier run, if it had the same options."""
    path = state_file(options.out)
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name in SAME:
        if state["options"].get(name) != getattr(options, name):
            raise UsageError(
                f"--{name} {getattr(options, name)}: the run to go on with had {state['options'].get(name)}"
            )
    if state["layers"] != trainer.layers:
        raise UsageError("--layers: the run to go on with had others")
    trainer.resume(state)


def run(options: Options) -> dict[str, Any]:
    """Train; returns what is written beside the weights as JSON."""
    from tqdm import tqdm

    check(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    where = device.resolve(options.device, options.dtype)
    loaded = models.load(options.model, options.dtype, where)
    count = loaded.model.config.get_text_config().num_hidden_layers
    layers = sorted(set(options.layers)) or list(range(count))
    if layers[0] < 0 or layers[-1] >= count:
        raise UsageError(f"--layers {layers[-1]}: must be from 0 to {count - 1}")
    most = options.tokens * options.sequences
    texts = corpus.Texts(loaded.tokenizer, corpus.texts(options.text), options.tokens, most)
    print(f"{len(texts.ids)} tokens of {len(texts.names)} texts; reading ...", file=sys.stderr, flush=True)
    pool = Pool(loaded, texts, layers, options)
    ids = corpus.held_out(loaded.tokenizer, options.held_out, min(options.tokens, HELD_OUT_TOKENS))
    unseen = read(loaded, ids, layers, pool.store, options.targets)
    trainer = Trainer(pool.at(0), options.hidden, options.rate, options.steps, options.seed, where.kind)
    if options.resume:
        resume(trainer, options)
    begin = last = time.monotonic()
    first, curve = trainer.step_number, []
    with tqdm(total=options.steps, initial=first, unit="step", desc="indexer", disable=None) as bar:
        for step in range(first, options.steps):
            loss = trainer.step(pool.for_step(step), options.kl)
            bar.update()
            if time.monotonic() - last > SAVE_EVERY or step + 1 == options.steps:
                vertical, slash = trainer.evaluate(unseen)
                curve.append({"step": step + 1, "loss": loss, "held_out": [vertical, slash]})
                unknown = f"on the held-out text verticals {vertical:.3f}, slashes {slash:.3f}"
                print(f"step {step + 1}: KL {loss:.3f}; {unknown}", file=sys.stderr, flush=True)
                save(trainer, options, loaded, texts)
                last = time.monotonic()
    results = {
        "schema": SCHEMA,
        **machine.describe(where.facts()),
        "model": loaded.name,
        "layers": layers,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "texts": texts.names,
        "curve": curve,
        "seconds": round(time.monotonic() - begin, 1),
    }
    options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results
