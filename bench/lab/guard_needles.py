"""Whether repairs find needles that a budget which is too low misses: SmolLM2 reads prompts under each mode.

    python bench/lab/guard_needles.py --tokens 2048 --depth 0.3 --policy "sketch(gain=0.3)" --out needles.json

Prompts are `flashprefill try`'s. The policies force nothing but the first block and the diagonal, so that it
is their choice that finds a needle or not.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from flashprefill import Dense
from flashprefill.apps import device, machine, models, needles, prompt
from flashprefill.guard import guard_of
from flashprefill.policies.text import parse

FORCED = {"sink_blocks": 1, "window_blocks": 1, "dense_tail_blocks": 0}


def main() -> None:
    """Write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--depth", type=float, action="append", default=[])
    parser.add_argument("--policy", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    where = device.resolve("cpu", "fp32")
    loaded = models.load(None, "fp32", where)
    cases: list[dict[str, Any]] = []
    results = {
        "schema": "flashprefill-guard-needles/1",
        **machine.describe(),
        "command": shlex.join(["python", "bench/lab/guard_needles.py", *sys.argv[1:]]),
        "model": {"name": loaded.name, "dtype": loaded.dtype},
        "cases": cases,
    }
    runs = [("dense", None)] + [
        (text, mode) for text in options.policy for mode in ("observe", "repair", "strict")
    ]
    for depth in options.depth or [0.5]:
        text = prompt.build(loaded.tokenizer, options.tokens, depth)
        for name, mode in runs:
            policy = Dense() if mode is None else parse(name, FORCED)
            case = needles.answer(loaded, policy, text, guard_of(mode))
            case = {"policy": policy.text, "mode": mode, "tokens": options.tokens, "depth": depth, **case}
            cases.append(case)
            print(
                depth, name, mode, case["found"], case["density"], case["guard"], case["answer"], flush=True
            )
            options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
