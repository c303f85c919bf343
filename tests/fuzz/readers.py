"""Fuzzes what reads text and files in Python: policies as text, tables of MInference and XAttention, plans of
Reuse, weights of VSPrefill, vLLM's options, names of models, dumps in three formats, and GGUF files. An
input is read, or refused by an error that its reader documents; any other exception is a finding. Cases that
were findings are among the seeds.

    python tests/fuzz/readers.py --seconds 60                # all targets, a minute each
    python tests/fuzz/readers.py --seconds 3600 dump_npz     # one of them

`make fuzz` runs each under atheris, where mutations follow the coverage of our own modules, and
tests/python/test_fuzz.py two seconds long.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutations import Target, run, run_atheris

# ---------------------------------------------------------------- targets


def _decoded(data: bytes) -> str:
    """As Python decodes the command line and names of files."""
    return data.decode("utf-8", "surrogateescape")


HARMLESS = ("", "json", "math", "no_such_module", ".x", "..", "json.decoder")  # modules that may be imported


def policy_text(data: bytes, _folder: Path) -> bool | None:
    """A policy as text; what is read is written as a text that reads the same."""
    from flashprefill.policies.text import parse

    text = _decoded(data)
    module, colon, _ = text.partition("(")[0].partition(":")
    if colon and module.strip() not in HARMLESS:
        return False
    policy = parse(text)
    if not colon and parse(policy.text) != policy:
        raise AssertionError(f"{policy.text} reads back as another policy")
    return True


def _table(method: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, folder: Path) -> None:
        import flashprefill as fp

        path = folder / "table.json"
        path.write_bytes(data)
        table = getattr(fp, method).from_config(path)
        for layer, policy in table.items():
            if layer != "default" and not isinstance(layer, int):
                raise AssertionError(f"layer {layer!r}")
            if policy.text == "":
                raise AssertionError("a policy without a text")

    return read


def reuse_plan(data: bytes, folder: Path) -> None:
    """A plan's file, and the policies of its layers; what is read is written, and read back the same."""
    from flashprefill.policies.reuse import Reuse, ReusePlan

    path = folder / "plan.json"
    path.write_bytes(data)
    plan = ReusePlan.load(path)
    policy = Reuse(plan, "streaming")
    for layer in (0, len(plan.layers)):
        if not policy.at_layer(layer).text:
            raise AssertionError("a policy without a text")
    plan.save(path)
    if ReusePlan.load(path) != plan:
        raise AssertionError("a plan reads back as another")


def indexer(data: bytes, folder: Path) -> None:
    """A file of VSPrefill's weights: whole, or its header alone."""
    import flashprefill as fp
    from flashprefill.policies.indexer import Indexer

    path = folder / "indexer.safetensors"
    if data.startswith(b"{"):
        data = struct.pack("<Q", len(data)) + data + bytes(4096)
    path.write_bytes(data)
    weights = Indexer.load(path)
    fp.VSPrefill(weights=weights).at_layer(min(weights.layers))
    weights.save(path, "fp32")
    if Indexer.load(path) != weights:
        raise AssertionError("weights read back as others")


def vllm_options(data: bytes, _folder: Path) -> bool:
    """The plugin's options, after vLLM has read the JSON."""
    from flashprefill.vllm.options import of_config

    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return False
    policy = value.get("policy") if isinstance(value, dict) else value
    if isinstance(policy, str) and ":" in policy and policy.partition(":")[0] not in HARMLESS:
        return False
    of_config({"flashprefill": value})
    return True


def model_name(data: bytes, _folder: Path) -> bool:
    """A model's name, for all policies that have published values."""
    import flashprefill as fp
    from flashprefill.policies.presets import PRESETS
    from flashprefill.policies.text import named

    types = {**named(), fp.TokenSparse.kind: fp.TokenSparse}
    found = False
    for method in PRESETS:
        try:
            policy = types[method].for_model(_decoded(data))
        except fp.InvalidArgumentError:
            continue
        found = True
        if not policy.source:
            raise AssertionError("a preset without a source")
    return found


def length(data: bytes, _folder: Path) -> None:
    """A number of tokens on the command line."""
    from flashprefill.apps.lengths import length

    if length(_decoded(data)) < 0:
        raise AssertionError("a negative length")


def _used(path: Path) -> None:
    """What `flashprefill inspect` and `flashprefill lab --from` do with a dump."""
    from flashprefill.apps import dump, errors, inspect
    from flashprefill.apps.lab import texts

    with contextlib.suppress(errors.UsageError):
        texts.load(path.parent)
    q, _ = dump.queries_and_keys(path)
    if max(q.shape) <= 1024:
        with contextlib.redirect_stdout(io.StringIO()):
            inspect.run(inspect.Options(path, ("streaming",), json=True))


def _npy(array: Any) -> bytes:
    import numpy as np

    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def dump_npz(data: bytes, folder: Path) -> None:
    """A whole file, or what is to be its q, with k and v as they should be."""
    import numpy as np

    path = folder / "text-layer0.npz"
    if not data.startswith(b"PK"):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("q.npy", data)
            for name in ("k.npy", "v.npy"):
                packed.writestr(name, _npy(np.ones((20, 1, 16), np.float32)))
        data = file.getvalue()
    path.write_bytes(data)
    _used(path)


def dump_safetensors(data: bytes, folder: Path) -> None:
    """A whole file, or its header alone."""
    path = folder / "text-layer0.safetensors"
    if data.startswith(b"{"):
        data = struct.pack("<Q", len(data)) + data + bytes(3 * 20 * 16 * 4)
    path.write_bytes(data)
    _used(path)


def dump_pt(data: bytes, folder: Path) -> None:
    """A whole file, or the pickle in it."""
    path = folder / "text-layer0.pt"
    if not data.startswith(b"PK"):
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(_pt())) as good, zipfile.ZipFile(file, "w") as packed:
            for name in good.namelist():
                packed.writestr(name, data if name.endswith("data.pkl") else good.read(name))
        data = file.getvalue()
    path.write_bytes(data)
    _used(path)


def gguf(data: bytes, folder: Path) -> None:
    """A model's file, as `flashprefill demo --model` reads it."""
    from flashprefill.apps import models

    path = folder / "model.gguf"
    path.write_bytes(data)
    models.load(path, "fp32")


# ---------------------------------------------------------------- seeds


def _tensors() -> dict[str, Any]:
    import torch

    return {name: torch.ones(20, 1, 16) for name in ("q", "k", "v")}


def _pt() -> bytes:
    import torch

    file = io.BytesIO()
    torch.save({**_tensors(), "scale": torch.tensor(0.25)}, file)
    return file.getvalue()


def _pickle() -> bytes:
    with zipfile.ZipFile(io.BytesIO(_pt())) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


def _safetensors() -> bytes:
    from safetensors.torch import save

    return save(_tensors())


def _npz() -> bytes:
    import numpy as np

    file = io.BytesIO()
    np.savez(file, **{name: np.ones((20, 1, 16), np.float16) for name in ("q", "k", "v")})
    return file.getvalue()


def _gguf() -> bytes:
    """A Llama of one layer, with a tokenizer of a few tokens."""
    import numpy as np
    from gguf import GGUFWriter, TokenType

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        writer = GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_context_length(64)
        writer.add_embedding_length(8)
        writer.add_feed_forward_length(8)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(5)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["<s>", "</s>", "a", "b", "ab"])
        writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * 3)
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        shapes = {"token_embd": (5, 8), "output_norm": (8,)}
        shapes |= {
            f"blk.0.{name}": (8, 8) for name in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        }
        shapes |= {
            "blk.0.attn_k": (4, 8),
            "blk.0.attn_v": (4, 8),
            "blk.0.attn_norm": (8,),
            "blk.0.ffn_norm": (8,),
        }
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _indexer() -> bytes:
    """Weights of one layer with one KV head."""
    import numpy as np

    from flashprefill.policies.indexer import Indexer, LayerWeights

    draw = np.random.default_rng(0)
    shapes = ((1, 3, 8), (1, 3), (1, 3), (1, 3))
    parts = (draw.standard_normal(shape).astype(np.float32) for shape in shapes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "indexer"
        Indexer({2: LayerWeights(*parts)}, "a model", 1e4).save(path)
        return path.read_bytes()


def _header(safetensors: bytes) -> bytes:
    return safetensors[8 : 8 + struct.unpack("<Q", safetensors[:8])[0]]


PLAN = {
    "schema": "flashprefill-reuse/1",
    "model": "a model",
    "policy": "streaming",
    "layers": [None, {"source": 0, "heads": [1, 0]}, {"source": 0, "heads": None}],
}


def _policy_words() -> tuple[list[bytes], list[bytes]]:
    from flashprefill.policies.library import FIELDS

    words = [
        b"(",
        b")",
        b"=",
        b", ",
        b"[",
        b"]",
        b"{",
        b"}",
        b"**",
        b"f''",
        b"lambda: 0",
        b" is ",
        b"*",
        b"ashape(",
    ]
    words += [b"json:dumps", b".x:f", b"no_such_module:f", b"maskpolicy", b"tri-shape(n_last=", b"n_init="]
    words += [b"reuse(", b"plan=", b"inner=", b"tokensparse(", b"layers=", b"coverage=", b"weights="]
    seeds = [b"ashape(n_init=128, n_local=256)", b"json:dumps(block_size=64)"]
    seeds += [b"tokensparse(inner=sketch(mass=0.9), layers=[1, 2])", b"vsprefill(weights='no_such_file')"]
    for name, fields in FIELDS.items():
        words.append(name.encode())
        seeds.append(name.encode())
        for field in fields:
            value = field.spelled_default()
            words += [
                field.name.encode(),
                f"{field.name}=".encode(),
                *(f"'{each}'".encode() for each in field.choices),
            ]
            seeds.append(f"{name}({field.name}={value})".encode())
    return seeds, words


JSON_WORDS = [
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b'"',
    b'"0"',
    b'"7"',
    b'"x"',
    b"{}",
    b"[]",
    b'"0": ',
    b"null",
    b'"\\ud800"',
]
PATTERNS = [b'"vertical_and_slash"', b'"stream_llm"', b'"block_sparse"', b"[0, 1, 2, 3]"]


def targets() -> dict[str, Target]:
    """All targets by name."""
    from flashprefill import FlashPrefillError
    from flashprefill.apps.errors import UsageError

    seeds, words = _policy_words()
    head = b'["vertical_and_slash", 100, 750, 0.9]'
    ours, usage = (FlashPrefillError,), (UsageError, FlashPrefillError)
    # A file in a text's place, and a text in a file's: what most people do wrong.
    files = [b"", b"PK\x05\x06" + bytes(18), b"q"]
    header = json.dumps(
        {
            name: {"dtype": "F32", "shape": [20, 1, 16], "data_offsets": [1280 * i, 1280 * (i + 1)]}
            for i, name in enumerate("qkv")
        }
    ).encode()
    options = {
        "policy": "sketch",
        "parameters": {"mass": 0.9},
        "min_chunk": 256,
        "log_seconds": 1,
        "metrics_hook": "a:b",
        "guard": "repair(target=0.95)",
    }
    import numpy as np

    arrays = [np.ones((1, 20, 2, 16), np.float32), np.ones((20, 1, 16)), np.ones((20, 1, 16), np.int64)]
    arrays += [np.full((20, 1, 16), "a"), np.zeros((0, 1, 16), np.float32), np.ones((20, 1, 16), "c8")]
    return {
        "policy_text": Target(policy_text, ours, seeds + TEXT_CASES, words),
        "minference_table": Target(
            _table("MInference"),
            ours,
            [
                b'[{"0": '
                + head
                + b', "1": ["stream_llm", 128, 4096, 1]}, {"1": ["block_sparse", 100, 0, 1]}]',
                *TABLE_CASES,
            ],
            JSON_WORDS + PATTERNS,
        ),
        "xattention_table": Target(
            _table("XAttention"), ours, [b"[[0.9, 0.8], [0.7, 1]]", *TABLE_CASES], JSON_WORDS
        ),
        "reuse_plan": Target(
            reuse_plan,
            ours,
            [json.dumps(PLAN).encode(), *TABLE_CASES],
            [*JSON_WORDS, b'"layers": ', b'"source": ', b'"heads": ', b'"policy": ', b'"streaming"'],
        ),
        "indexer": Target(
            indexer,
            ours,
            [*files, _indexer(), _header(_indexer()), *INDEXER_CASES],
            [*JSON_WORDS, b'"F32"', b'"BF16"', b'"shape":', b'"hidden":', b"layers.2.kv.0.up"],
        ),
        "vllm_options": Target(
            vllm_options,
            ours,
            [json.dumps(options).encode(), b'"flexprefill(gamma=0.9)"', b"true", *TABLE_CASES],
            [*JSON_WORDS, *words, *(f'"{name}": '.encode() for name in options)],
        ),
        "model_name": Target(
            model_name,
            ours,
            [b"meta-llama/Llama-3.1-8B-Instruct", b"Qwen/Qwen2.5-VL-7B", b"qwen3_moe"],
            [b"-", b"/", b".", b"llama", b"Qwen", b"2.5", b"-VL", b"glm-4", b"yi"],
        ),
        "length": Target(
            length,
            (ValueError,),
            [b"4K", b"1,024", b"6000"],
            [b"k", b"K", b",", b"_", "²".encode(), "٣".encode()],
        ),
        "dump_npz": Target(
            dump_npz,
            usage,
            [*files, _npz(), *map(_npy, arrays)],
            [b"'descr': ", b"'<f8'", b"'|O'", b"(20, 1, 16)", b"True"],
        ),
        "dump_safetensors": Target(
            dump_safetensors,
            usage,
            [*files, _safetensors(), header],
            [
                *JSON_WORDS,
                b'"F16"',
                b'"BF16"',
                b'"I64"',
                b'"BOOL"',
                b'"F8_E4M3"',
                b'"shape":',
                b'"__metadata__":',
                b'"q"',
            ],
        ),
        "dump_pt": Target(
            dump_pt,
            usage,
            [*files, _pt(), _pickle()],
            [b"q", b"k", b"FloatStorage", b"LongStorage", b"cpu", b"."],
        ),
        "gguf": Target(
            gguf, usage, [*files, _gguf()], [b"GGUF", b"llama.", b"general.", b"gpt2", b"llama", b"t5"]
        ),
    }


# Cases that were findings.
TEXT_CASES = [
    b".x:f",
    b"minference(heads=2)",
    b"sketch(mass=" + b"[" * 250,
    b"sketch(outliers=0x" + b"f" * 4000 + b")",
]
TEXT_CASES += [b"sketch(mass={[]})", b"sketch(mass=1" + b"0" * 400 + b")", b"dense(a=" + b"-" * 3000 + b"1)"]
TEXT_CASES += [b"reuse", b"reuse(plan='.')", b"reuse(plan='no_such_file')", b"tokensparse(inner=reuse)"]
TEXT_CASES += [
    b"minference(mean_correction=0x" + b"f" * 4000 + b")",
    b"dense(skip=(0x" + b"f" * 4000 + b",))",
]
INDEXER_CASES = [
    b'{"__metadata__": {"method": "vsprefill", "version": "1", "slash": "offset", "n_kv_heads": "1", '
    b'"head_dim": "1", "hidden": "1", "rope_theta": '
    + theta
    + b"}, "
    + b", ".join(
        b'"layers.0.kv.0.%b": {"dtype": "F32", "shape": %b, "data_offsets": [0, %b]}' % tensor
        for tensor in (
            (b"up", b"[1, 2]", b"8"),
            (b"bias", b"[1]", b"4"),
            (b"vertical", shape, b"4"),
            (b"slash", b"[1]", b"4"),
        )
    )
    + b"}"
    for theta, shape in (
        (b'"1e4"', b"[1]"),
        (b"[]", b"[1]"),
        (b"1" + b"0" * 400, b"[1]"),
        (b"1", b"[1" + b"0" * 30 + b"]"),
    )
]
TABLE_CASES = [
    b"",
    b"[" * 4000,
    b"\xff",
    b'[{"x": []}]',
    b'[{"0": 1}]',
    b'[{"999999999999": ["stream_llm", 1, 2, 3]}]',
]
TABLE_CASES += [b'[{"0": ["stream_llm", 1' + b"0" * 4000 + b", 2, 3]}]", b"[[1" + b"0" * 400 + b"]]"]


def _with_coverage() -> bool:
    """Import our modules so that atheris sees what they run; False without atheris."""
    try:
        import atheris
    except ImportError:
        return False
    with atheris.instrument_imports(include=["flashprefill"]):
        for name in ("apps.inspect", "apps.lab.texts", "apps.models", "policies.text", "vllm.options"):
            importlib.import_module(f"flashprefill.{name}")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", help="all if none is given")
    parser.add_argument(
        "atheris", nargs="*", help="after --: options of libFuzzer and the folder of a corpus"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the names of targets")
    options = parser.parse_args()
    led = bool(options.atheris) and _with_coverage()
    known = targets()
    if options.list:
        print("\n".join(known))
        return
    if options.target not in (None, *known):
        parser.error(f"{options.target}: must be one of {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in [options.target] if options.target else known:
            if led:
                run_atheris(name, known[name], Path(folder), options.atheris)
            count = run(name, known[name], Path(folder), options.seconds, seed=options.seed)
            print(f"{name}: {count.inputs} inputs, {count.read} read, no finding", flush=True)


if __name__ == "__main__":
    main()
