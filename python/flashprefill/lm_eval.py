"""lm-eval with flashprefill in it: importing this registers the model "flashprefill".

    python -m flashprefill.lm_eval --model flashprefill --model_args pretrained=PATH,policy=sketch --tasks
    fp_ruler

takes what the command `lm_eval` takes. It also knows the tasks of `flashprefill eval` (fp_ruler and its
tasks), which generate their prompts from local text. In a program of your own:

    import flashprefill.lm_eval
    lm_eval.simple_evaluate(model="flashprefill", model_args={"pretrained": PATH, "policy": "sketch"}, ...)
"""

from __future__ import annotations

import sys
from pathlib import Path

from .apps import checks
from .apps.errors import UsageError
from .apps.eval import harness

__all__ = ["TASKS_PATH", "FlashPrefillLM", "main"]

TASKS_PATH = Path(__file__).parent / "apps" / "eval" / "tasks"
"""What `--include_path` of `lm_eval` wants."""

checks.need("flashprefill.lm_eval", "torch", "transformers", *harness.PACKAGES)

from .apps.eval.model import FlashPrefillLM  # noqa: E402


def main() -> int:
    """Run lm-eval's own command line tool; returns the exit code."""
    from lm_eval.__main__ import cli_evaluate

    if not any(argument.startswith("--include_path") for argument in sys.argv):
        runs = len(sys.argv) > 1 and (sys.argv[1].startswith("-") or sys.argv[1] in ("run", "validate", "ls"))
        if runs and not {"-h", "--help"} & set(sys.argv):
            sys.argv += ["--include_path", str(TASKS_PATH)]
    try:
        cli_evaluate()
    except UsageError as error:
        print(f"flashprefill: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
