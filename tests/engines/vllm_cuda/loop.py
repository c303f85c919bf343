"""Mixed batches read with FlashPrefill beside the engine's own kernel, over and over in one engine; no test.

    python loop.py --passes 170

A pass is six prompts of 500 to 20,000 tokens that come together or one after the other and generate, with
query_pool 1 and 16 by turns; each layer's results are compared with FlashAttention's over the whole batch. So
a deadlock of our kernels was found. Prints the passes that are clean; after 40 s without an end, all stacks.
"""

import argparse
import faulthandler
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / name) for name in ("vllm", "common")] + [
    str(HERE.parents[2] / "bench/vllm")
]
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_ALLOW_INSECURE_SERIALIZATION="1")

import structured_llama as model  # noqa: E402
from answers import Request  # noqa: E402
from beside import engines_own  # noqa: E402
from engine import CUDA, Engine  # noqa: E402

from flashprefill.vllm import backend, options  # noqa: E402

SHAPE = {
    "hidden_size": 1024, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 2048,
}  # fmt: skip
PROMPTS = [(1400, 24, 0), (1800, 24, 0), (3000, 12, 3), (9000, 12, 3), (20000, 12, 3), (500, 12, 3)]
S = 1 if CUDA else 16  # a CPU's prompts are shorter


def requests(turn):
    """The prompts in their order, or the other way round and every second one later."""
    asked = [
        Request(model.text(n // S, 3 + i), new, at) for i, (n, new, at) in enumerate(PROMPTS)
    ]  # fmt: skip
    if turn % 2 == 0:
        return asked
    return [Request(r.ids, r.new, r.at or 2 * (i % 2)) for i, r in enumerate(asked[::-1])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--passes", type=int, default=170)
    parser.add_argument("--seconds", type=float, default=600)
    asked = parser.parse_args()
    builders, prepare = [], backend.BuilderMixin.__init__

    def noted(builder, *arguments, **keywords):
        prepare(builder, *arguments, **keywords)
        builders.append(builder)

    backend.BuilderMixin.__init__ = noted
    folder = model.write_config(Path(tempfile.mkdtemp()), 4, SHAPE if CUDA else model.SMALL)
    engine = Engine(
        folder, {"flashprefill": "dense"}, dtype="bfloat16" if CUDA else "float32", max_len=140000 // S,
        memory=(4 << 30) if CUDA else (1 << 28), load_format="dummy", max_num_batched_tokens=8192 // S,
        block_size=16 if CUDA else 128, max_num_seqs=32, enable_prefix_caching=True,
    )  # fmt: skip
    engine.llm.apply_model(model.set_weights)
    begin, turn, calls = time.monotonic(), 0, 0
    while turn < asked.passes and time.monotonic() - begin < asked.seconds:
        faulthandler.dump_traceback_later(40 if CUDA else 600, exit=True)
        policy = {"policy": "flashprefill", "parameters": {"alpha": 0.12, "query_pool": (1, 16)[turn % 2]}}
        for builder in builders:
            builder.options = options.of_config({"flashprefill": {**policy, "min_chunk": 128}})
        engine.llm.reset_prefix_cache()
        with engines_own() as found:
            engine.run(requests(turn))
        assert found and all(layer.finite for layer in found)
        turn, calls = turn + 1, calls + len(found)
        if turn % 10 == 0 or turn == asked.passes:
            print(f"{turn} passes clean, {calls} layers' calls, {time.monotonic() - begin:.1f} s", flush=True)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
