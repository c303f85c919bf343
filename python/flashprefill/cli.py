"""The command line tool: `flashprefill info | demo | try | eval | lab | bench | inspect | ...`.

Only arguments live here; each verb is a module of flashprefill.apps, imported when it is called, so that
`--help` is instant and `info` works without PyTorch. What a user can put right ends in one line and exit
code 2, as argparse's own errors do.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import _cli_texts as texts
from .apps.errors import UsageError
from .apps.lengths import length
from .policies.library import FIELDS


def _policies() -> str:
    """Return the help on policies: how they are written, and the fields of all with their defaults."""
    lines = [
        'policies are written as text, like sketch or "flashprefill(alpha=0.2, query_pool=16)", or as',
        '"your_module:your_function" for your own selection (flashprefill.MaskPolicy). Fields and defaults:',
    ]
    for name, fields in FIELDS.items():
        shown = ", ".join(f"{field.name}={field.spelled_default()}" for field in fields)
        lines += textwrap.wrap(f"{name:<16} {shown}", 100, initial_indent="  ", subsequent_indent=" " * 19)
    return "\n".join(lines)


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def read(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: write numbers, separated by commas") from None

    return read


def make_parser() -> argparse.ArgumentParser:
    """All verbs and their arguments."""
    parser = argparse.ArgumentParser(
        "flashprefill",
        description=texts.DESCRIPTION,
        epilog=texts.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    add = _verb(verbs, "info", "what is installed and what runs here", "What is installed and runs here.")
    add("--json", action="store_true", help="print JSON")
    _add_demo(verbs)
    _add_try(verbs)
    _add_eval(verbs)
    _add_lab(verbs)
    _add_bench(verbs)
    _add_inspect(verbs)
    _add_train_indexer(verbs)
    _add_train_adapter(verbs)
    _add_plan_reuse(verbs)
    return parser


def _verb(verbs: Any, name: str, help_line: str, description: str, examples: str = "") -> Callable[..., Any]:
    """Add a verb; returns what adds its arguments."""
    formatter = argparse.RawDescriptionHelpFormatter
    verb = verbs.add_parser(
        name, help=help_line, description=description, epilog=examples, formatter_class=formatter
    )
    add: Callable[..., Any] = verb.add_argument
    return add


def _length(text: str) -> int:
    try:
        return length(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of tokens like 4K or 6000") from None


# Arguments that several verbs have.


def _add_model(add: Callable[..., Any]) -> None:
    """What model, and where it runs."""
    what = "a Hugging Face directory or a GGUF file (default: the packaged SmolLM2)"
    add("--model", type=Path, metavar="PATH", help=what)
    _add_where(add)


def _add_where(add: Callable[..., Any]) -> None:
    """Where and how to compute."""
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: cuda if PyTorch and flashprefill both find a GPU to use, and the dtype is not fp32",
    )
    add(
        "--dtype",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="auto: bf16 on a GPU and if the CPU computes in it, or fp32",
    )
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")


def _add_prompt(add: Callable[..., Any]) -> None:
    what = "text to hide the needle in (default: licences and Python's source)"
    add("--prompt", type=Path, metavar="FILE", help=what)


def _add_texts(add: Callable[..., Any]) -> None:
    what = "a file or folder of text (default: licences and Python's source on this machine)"
    add("--text", type=Path, metavar="PATH", help=what)
    what = "a text to judge by that is not learnt from (default: Python's argparse)"
    add("--held-out", type=Path, metavar="PATH", help=what)


def _add_adapter(add: Callable[..., Any]) -> None:
    what = "what train-adapter wrote for the model: it reads longer prompts with it"
    add("--adapter", type=Path, metavar="DIR", help=what)


def _add_policy(add: Callable[..., Any], what: str) -> None:
    add("--policy", action="append", default=[], help=f"{what}; may be repeated")


def _add_guard(add: Callable[..., Any], when: str) -> None:
    what = f"observe, repair, strict (fields in brackets), or off (default: observe{when})"
    add("--guard", default="observe", metavar="MODE", help=what)


def _add_folder(add: Callable[..., Any], folder: str) -> None:
    add(
        "--out",
        type=Path,
        default=Path(folder),
        metavar="DIR",
        help=f"where results go (default: {folder})",
    )


def _add_figures(add: Callable[..., Any]) -> None:
    add("--out", type=Path, metavar="FILE", help="write all figures as JSON")


# The verbs.


def _add_demo(verbs: Any) -> None:
    epilog = texts.DEMO_EXAMPLES + _policies()
    add = _verb(verbs, "demo", "a real model reads a long prompt", texts.DEMO, epilog)
    _add_model(add)
    _add_prompt(add)
    _add_policy(add, "compare this policy (default: four of them)")
    add("--tokens", type=_length, metavar="N", help="length of the prompt (default: 7600; with --long 24000)")
    what = "where the needle is, from 0 to 1; may be repeated (0.5)"
    add("--depth", type=float, action="append", metavar="X", help=what)
    add("--no-needle", action="store_true", help="hide nothing and ask nothing: just continue the text")
    add("--long", action="store_true", help="24,000 tokens, with the rotary base scaled four times; one turn")
    what = "turns that are timed (default: 3; with --long or --quick 1)"
    add("--repeats", type=int, metavar="N", help=what)
    _add_guard(add, ", in the first turn alone")
    _add_folder(add, "out/demo")
    add("--quick", action="store_true", help="1,536 tokens and one turn: a try, not a measurement")


def _add_try(verbs: Any) -> None:
    epilog = texts.TRY_EXAMPLES + _policies()
    add = _verb(verbs, "try", "do policies find what dense finds?", texts.TRY, epilog)
    _add_model(add)
    _add_prompt(add)
    _add_policy(add, "a policy (default: flashprefill and sketch)")
    what = "lengths of prompts (default: 4K,8000)"
    add("--tokens", type=_list_of(_length), default=[4096, 8000], metavar="N,N", help=what)
    what = "where the needle is (0.1,0.5,0.9)"
    add("--depth", type=_list_of(float), default=[0.1, 0.5, 0.9], metavar="X,X", help=what)
    _add_guard(add, "")
    _add_figures(add)


def _add_eval(verbs: Any) -> None:
    epilog = texts.EVAL_EXAMPLES + _policies()
    add = _verb(verbs, "eval", "RULER, InfiniteBench, LongBench v2", texts.EVAL, epilog)
    what = "ruler, infinitebench, longbench2, or tasks of them, separated by commas (default: ruler)"
    add("suites", nargs="?", default="ruler", metavar="SUITES", help=what)
    _add_model(add)
    _add_adapter(add)
    what = "names of policies, separated by commas, or all (default: dense,flashprefill,sketch)"
    add("--pattern", type=_list_of(str), default=[], metavar="NAME,NAME", help=what)
    _add_policy(add, "a policy with its fields, besides those of --pattern")
    what = "tokens of prompt and answer (default: 4K,8K as far as the model reads)"
    add("--lengths", type=_list_of(_length), default=[], metavar="N,N", help=what)
    add("--samples", type=int, default=25, metavar="N", help="prompts per task and length (default: 25)")
    add("--seed", type=int, default=42, metavar="N", help="of the prompts (default: 42)")
    what = "hide needles in this file or folder of text (default: licences on this machine)"
    add("--text", type=Path, metavar="PATH", help=what)
    what = "folder with files of QA tasks, InfiniteBench, LongBench v2"
    add("--data", type=Path, metavar="DIR", help=what)
    what = "who reads the prompt's last token (default: dense)"
    add("--last-token", choices=("dense", "policy"), default="dense", help=what)
    add("--max-tokens", type=int, metavar="N", help="cut answers here (default: as each task says)")
    what = "ask no more after so long; what was answered is shown, and a second run goes on"
    add("--minutes", type=float, metavar="X", help=what)
    add("--chat", action="store_true", help="ask in the model's chat template")
    what = "beyond the model's context, scale its rotary base by a power of two"
    add("--stretch", action="store_true", help=what)
    add("--fresh", action="store_true", help="forget the answers of earlier runs in --out")
    _add_folder(add, "out/eval")


def _add_lab(verbs: Any) -> None:
    add = _verb(verbs, "lab", "every method against the true attention", texts.LAB, texts.LAB_EXAMPLES)
    _add_model(add)
    what = "gpl, code or long; may be repeated (default: all)"
    add("--text", action="append", default=[], metavar="NAME", help=what)
    add("--prompt", type=Path, metavar="FILE", help="read this file instead")
    add("--tokens", type=_length, metavar="N", help="the length of each text")
    what = "with --prompt: scale the rotary base four times (default 24,000 tokens)"
    add("--long", action="store_true", help=what)
    what = "layers to look at (default: six, early to late)"
    add("--layers", type=_list_of(int), default=[], metavar="N,N", help=what)
    what = "only this method, line (by its label) or module:function of yours; may be repeated (default: all)"
    add("--method", action="append", default=[], metavar="NAME", help=what)
    what = "weights for VSPrefill, of train-indexer; without them it is left out"
    add("--indexer", type=Path, metavar="FILE", help=what)
    add("--no-studies", action="store_true", help="leave out the studies (alpha, allocation, gamma, tau)")
    add("--dump", type=Path, metavar="DIR", help="keep Q, K and V of the layers here")
    add("--from", type=Path, dest="source", metavar="DIR", help="use dumps instead of a model")
    what = "with --from: only measure the times of the run in --out again"
    add("--times-only", action="store_true", help=what)
    _add_folder(add, "out/lab")
    what = "3,072 tokens, two layers, three values per method: a try, not a measurement"
    add("--quick", action="store_true", help=what)


def _add_bench(verbs: Any) -> None:
    epilog = texts.BENCH_EXAMPLES + _policies()
    add = _verb(verbs, "bench", "attention alone, against PyTorch's", texts.BENCH, epilog)
    what = "heads, head_dim and tokens; may be repeated (9/3x64x8K; on a GPU 32/8x128 at 16K and 64K)"
    add("--shape", action="append", metavar="Q/KVxDIMxTOKENS", help=what)
    what = "time this policy; may be repeated (default: dense and three more)"
    add("--policy", action="append", help=what)
    what = "random masks of these densities (0.5,0.25,0.1)"
    add("--density", type=_list_of(float), metavar="X,X", help=what)
    _add_where(add)
    add(
        "--target", help="an instruction set or a GPU's kernels, from `flashprefill info` (default: the best)"
    )
    add("--backend", help="a backend from `flashprefill info` (default: the best)")
    add("--repeats", type=int, default=5, metavar="N", help="timed turns (default: 5)")
    _add_figures(add)


def _add_inspect(verbs: Any) -> None:
    epilog = texts.INSPECT_EXAMPLES + _policies()
    add = _verb(verbs, "inspect", "what a policy keeps of a saved Q/K dump", texts.INSPECT, epilog)
    add("file", type=Path, help="the dump: .npz, .safetensors or .pt with q and k")
    _add_policy(add, "select by this policy (default: flashprefill)")
    what = "query heads to show (default: the first four)"
    add("--heads", type=_list_of(int), default=[], metavar="N,N", help=what)
    add("--scale", type=float, metavar="X", help="softmax scale (default: 1/sqrt(head_dim))")
    add("--out", type=Path, metavar="FILE.png", help="draw the masks into a picture")
    add("--json", action="store_true", help="print the statistics as JSON")
    add("--no-text", action="store_true", help="leave out the masks drawn in characters")


def _add_train_indexer(verbs: Any) -> None:
    add = _verb(verbs, "train-indexer", "weights for VSPrefill", texts.INDEXER, texts.INDEXER_EXAMPLES)
    _add_model(add)
    _add_texts(add)
    what = "tokens of the longest sequences; others have a half and a quarter (default: 8K)"
    add("--tokens", type=_length, default=8192, metavar="N", help=what)
    add("--sequences", type=int, default=200, metavar="N", help="sequences that are read (default: 200)")
    add("--steps", type=int, default=2000, metavar="N", help="steps of learning (default: 2000)")
    add("--hidden", type=int, default=256, metavar="N", help="hidden units per KV head (default: 256)")
    add("--layers", type=_list_of(int), default=[], metavar="N,N", help="only these layers (default: all)")
    add("--rate", type=float, default=1e-3, metavar="X", help="peak learning rate (default: 0.001)")
    what = "forward, KL(true || predicted), or reverse, as the paper prints it (default: forward)"
    add("--kl", choices=("forward", "reverse"), default="forward", help=what)
    what = "what is learnt: attention beyond sink and window per row that sees a key (far), or all of it, "
    what += "summed over rows, as published (default: far)"
    add("--targets", choices=("far", "published"), default="far", help=what)
    what = "sequences that are kept to learn from again (default: 8)"
    add("--pool", type=int, default=8, metavar="N", help=what)
    add("--seed", type=int, default=0, metavar="N", help="of weights and sequences (default: 0)")
    add("--resume", action="store_true", help="go on with the run that --out is of")
    what = "where the weights go (default: indexer.safetensors)"
    add("--out", type=Path, default=Path("indexer.safetensors"), metavar="FILE", help=what)


def _add_train_adapter(verbs: Any) -> None:
    add = _verb(verbs, "train-adapter", "a model for longer prompts", texts.ADAPTER, texts.ADAPTER_EXAMPLES)
    _add_model(add)
    add("--text", type=Path, metavar="PATH", help="learn from this file or folder of text")
    what = "tokens of the longest sequences; others have a half and a quarter (default: 32K)"
    add("--tokens", type=_length, default=32768, metavar="N", help=what)
    what = "tokens of a step, in sequences of one length (default: 32K)"
    add("--batch", type=_length, default=32768, metavar="N", help=what)
    add("--minutes", type=float, default=25.0, metavar="X", help="how long to train (default: 25)")
    add("--steps", type=int, default=20000, metavar="N", help="but no more steps than these (default: 20000)")
    what = "the rotary base (default: the model's, times twice the growth of its context)"
    add("--base", type=float, metavar="X", help=what)
    add("--rank", type=int, default=16, metavar="N", help="of the adapter (default: 16)")
    add(
        "--alpha", type=float, default=32.0, metavar="X", help="its scale is this over the rank (default: 32)"
    )
    add("--rate", type=float, default=1e-3, metavar="X", help="peak learning rate (default: 0.001)")
    what = "needles that are looked for at each save, at three lengths (default: 10)"
    add("--needles", type=int, default=10, metavar="N", help=what)
    add("--checkpoint", action="store_true", help="compute activations twice: less memory, a third more time")
    add("--seed", type=int, default=0, metavar="N", help="of weights and sequences (default: 0)")
    add("--resume", action="store_true", help="go on with the run that --out is of")
    _add_folder(add, "out/adapter")


def _add_plan_reuse(verbs: Any) -> None:
    epilog = texts.REUSE_EXAMPLES + _policies()
    add = _verb(verbs, "plan-reuse", "which layers can reuse masks", texts.REUSE, epilog)
    _add_model(add)
    _add_texts(add)
    add("--policy", default="flashprefill", help="the policy that selects (default: flashprefill)")
    what = "share of the layers that borrow (default: 0.33)"
    add("--share", type=float, default=1 / 3, metavar="X", help=what)
    add("--tokens", type=_length, default=4096, metavar="N", help="tokens of each text (default: 4K)")
    add("--sequences", type=int, default=2, metavar="N", help="texts that are planned with (default: 2)")
    what = "times that the plan is made again, of a forward under it (default: 1)"
    add("--refine", type=int, default=1, metavar="N", help=what)
    what = "a policy to compare with on the held-out text; may be repeated"
    add("--against", action="append", default=[], metavar="POLICY", help=what)
    add("--seed", type=int, default=0, metavar="N", help="of the texts (default: 0)")
    add("--out", type=Path, default=Path("plan.json"), metavar="FILE", help="the plan (default: plan.json)")


def _run(arguments: argparse.Namespace) -> int:
    from .apps import checks

    given = vars(arguments)
    same: tuple[str, ...]  # options that have the argument's name
    if arguments.verb == "info":
        from .apps import info

        info.run(arguments.json)
    elif arguments.verb == "demo":
        from .apps import demo

        same = ("model", "prompt", "device", "dtype", "tokens", "long", "quick", "repeats", "threads", "out")
        same += ("guard",)
        options = demo.Options(
            **{name: given[name] for name in same}, policies=arguments.policy, needle=not arguments.no_needle
        )
        if arguments.depth:
            options.depths = arguments.depth
        demo.run(options)
    elif arguments.verb == "try":
        from .apps import needles

        same = ("model", "device", "dtype", "threads", "prompt", "tokens", "guard", "out")
        chosen = {name: given[name] for name in same}
        results = needles.run(needles.Options(**chosen, policies=arguments.policy, depths=arguments.depth))
        return 0 if results["passed"] else 1
    elif arguments.verb == "eval":
        from .apps.eval import run as evaluation

        same = (
            "model",
            "adapter",
            "device",
            "dtype",
            "threads",
            "lengths",
            "samples",
            "seed",
            "text",
            "data",
        )
        same += ("last_token", "max_tokens", "minutes", "chat", "stretch", "fresh", "out")
        chosen = {name: given[name] for name in same}
        evaluation.run(
            evaluation.Options(
                **chosen,
                suites=arguments.suites.split(","),
                patterns=arguments.pattern,
                policies=arguments.policy,
            )
        )
    elif arguments.verb == "lab":
        modules: tuple[str, ...] = ("torch", "matplotlib", "tqdm")
        if arguments.source is None:
            modules += ("transformers", *checks.modules_of(arguments.model))
        checks.need("the lab", *modules)
        from .apps.lab import run as lab

        same = ("model", "device", "dtype", "threads", "text", "prompt", "tokens", "long", "layers", "method")
        same += ("dump", "source", "times_only", "out", "quick", "indexer")
        lab.run(lab.Options(**{name: given[name] for name in same}, studies=not arguments.no_studies))
    elif arguments.verb == "bench":
        checks.need("bench", "torch", "tqdm")
        from .apps import bench

        same = ("device", "dtype", "target", "backend", "threads", "repeats", "out")
        lists = {"shape": "shapes", "policy": "policies", "density": "densities"}
        chosen = {field: given[name] for name, field in lists.items() if given[name] is not None}
        bench.run(bench.Options(**{name: given[name] for name in same}, **chosen))
    elif arguments.verb == "inspect":
        from .apps import inspect

        same = ("file", "heads", "scale", "out", "json")
        chosen = {name: given[name] for name in same}
        inspect.run(inspect.Options(**chosen, policies=arguments.policy, text=not arguments.no_text))
    elif arguments.verb == "train-indexer":
        checks.need("train-indexer", "torch", "transformers", "tqdm", *checks.modules_of(arguments.model))
        from .apps import indexer

        same = ("model", "device", "dtype", "threads", "text", "held_out", "tokens", "sequences", "steps")
        same += ("hidden", "rate", "kl", "targets", "pool", "seed", "resume", "out")
        chosen = {name: given[name] for name in same}
        indexer.run(indexer.Options(**chosen, layers=tuple(arguments.layers)))
    elif arguments.verb == "train-adapter":
        packages = ("torch", "transformers", "safetensors", "tqdm")
        checks.need("train-adapter", *packages, *checks.modules_of(arguments.model))
        from .apps.adapter import run as adapter

        same = ("model", "device", "dtype", "threads", "text", "tokens", "batch", "minutes", "steps", "base")
        same += ("rank", "alpha", "rate", "needles", "checkpoint", "seed", "resume", "out")
        adapter.run(adapter.Options(**{name: given[name] for name in same}))
    elif arguments.verb == "plan-reuse":
        checks.need("plan-reuse", "torch", "transformers", "tqdm", *checks.modules_of(arguments.model))
        from .apps import reuse

        same = ("model", "device", "dtype", "threads", "text", "held_out", "policy", "share", "tokens")
        same += ("sequences", "refine", "seed", "out")
        chosen = {name: given[name] for name in same}
        reuse.run(reuse.Options(**chosen, against=tuple(arguments.against)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        if arguments.version:
            from . import __version__

            print(f"flashprefill {__version__}")
        elif arguments.verb is None:
            parser.print_help()
        else:
            return _run(arguments)
    except UsageError as error:
        print(f"flashprefill: {error}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, NotImplementedError, MemoryError) as error:
        from .errors import FlashPrefillError

        if not isinstance(error, FlashPrefillError):
            raise
        print(f"flashprefill: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flashprefill: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
