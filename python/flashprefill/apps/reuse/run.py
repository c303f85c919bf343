"""plan-reuse's order of work: profile under the policy, plan, profile under the plan, plan again, compare."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...policies import ReusePlan
from .. import checks, corpus, device, machine, models, table
from ..errors import UsageError
from ..spec import parse_policy
from . import choose
from .profile import Profile, losses, plan_of, read


@dataclass
class Options:
    """The command line's options."""

    model: Path | None = None
    policy: str = "flashprefill"
    share: float = 1 / 3
    tokens: int = 4096
    sequences: int = 2
    refine: int = 1
    text: Path | None = None
    held_out: Path | None = None
    against: tuple[str, ...] = ()
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    out: Path = Path("plan.json")


def check(options: Options) -> None:
    """Refuse what argparse cannot know."""
    if not 0 < options.share < 1:
        raise UsageError(f"--share {options.share}: must be above 0 and below 1")
    if options.tokens < 256:
        raise UsageError(f"--tokens {options.tokens}: must be at least 256")
    for name, least in (("sequences", 1), ("refine", 0)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name} {getattr(options, name)}: must be at least {least}")
    for text in (options.policy, *options.against):
        parse_policy(text)
    checks.can_write(options.out, (".json",))
    checks.can_run(options.model, options.device, options.dtype)


def run(options: Options) -> dict[str, Any]:
    """Make a plan and write it; returns its content."""
    from tqdm import tqdm

    check(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    where = device.resolve(options.device, options.dtype)
    loaded = models.load(options.model, options.dtype, where)
    inner = parse_policy(options.policy)
    count = loaded.model.config.get_text_config().num_hidden_layers
    borrow = min(count - 1, round(options.share * count))
    most = options.tokens * 4 * options.sequences
    texts = corpus.Texts(loaded.tokenizer, corpus.texts(options.text), options.tokens, most)
    ids = [texts.cut(number, options.seed, options.tokens) for number in range(options.sequences)]
    unseen = corpus.held_out(loaded.tokenizer, options.held_out, options.tokens)
    plan: ReusePlan | None = None
    total = (1 + options.refine) * len(ids) + 2 + len(options.against)
    with tqdm(total=total, unit="text", desc="reading", disable=None) as bar:

        def look(tokens: list[int], policy: Any = inner, active: ReusePlan | None = None) -> Profile:
            profile = read(loaded, tokens, policy, active)
            bar.update()
            return profile

        for _ in range(1 + options.refine):
            loss, heads = losses([look(one, active=plan) for one in ids])
            plan = plan_of(choose.sources(loss.numpy(), borrow), heads, inner.text, loaded.name)
        assert plan is not None
        rows = [_row(inner.text, look(unseen), None)]
        rows.append(_row(f"reuse of {borrow} of {count} layers", look(unseen, active=plan), plan))
        rows += [_row(text, look(unseen, parse_policy(text)), None) for text in options.against]
    notes = {
        "share": round(plan.share, 4),
        "tokens": options.tokens,
        "texts": texts.names,
        "refined": options.refine,
        "held_out": rows,
        "machine": machine.describe(where.facts()),
    }
    plan = dataclasses.replace(plan, notes=notes)
    plan.save(options.out)
    report(rows, plan, options.out)
    return plan.as_json()


def _row(label: str, profile: Profile, plan: ReusePlan | None) -> dict[str, Any]:
    recall, density = profile.means(plan)
    seconds = round(profile.select_seconds, 4)
    return {
        "label": label,
        "recall": round(recall, 4),
        "density": round(density, 4),
        "select_seconds": seconds,
    }


def report(rows: list[dict[str, Any]], plan: ReusePlan, out: Path) -> None:
    """Print what was found, on the text that was not planned with."""
    cells = [
        [row["label"], f"{row['recall']:.4f}", f"{row['density']:.3f}", f"{row['select_seconds']:.3f} s"]
        for row in rows
    ]
    print(table.render(["on the held-out text", "recall", "density", "selection"], cells))
    borrowed = ", ".join(f"{n} from {own.source}" for n, own in enumerate(plan.layers) if own is not None)
    print(f"layers that borrow: {borrowed}\nwritten to {out}")
