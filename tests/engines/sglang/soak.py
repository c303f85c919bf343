"""SGLang's HTTP server with the plugin under many clients for a while.

    tests/engines/sglang/run.sh --python soak.py --seconds 600

What is asked and judged is common/soaking.py's. Two ways to serve:

--way whole (default): prompts in one piece, sparse. A batch may hold several; each selects as it does alone.
--way chunks: chunks of 512 rows mixed with tokens that are generated, over a radix cache, with all blocks
kept, since a chunk's size depends on who else is there, and with it what a policy selects. The cache is too
small for all prompts, so they are read again and again.
"""

import sys
from pathlib import Path

import soaking
from answers import tokens

from flashprefill import sglang as plugin

PORT = 18439
URL = f"http://127.0.0.1:{PORT}"
PLAIN = [
    "--device", "cpu", "--attention-backend", "torch_native", "--skip-tokenizer-init", "--dtype", "float32",
    "--host", "127.0.0.1", "--port", str(PORT), "--mem-fraction-static", "0.3",
    "--max-running-requests", "8", "--random-seed", "1", "--log-level", "info", "--skip-server-warmup",
]  # fmt: skip
WAYS = {
    "whole": (
        ["--chunked-prefill-size", "-1", "--disable-radix-cache", "--max-total-tokens", "24576"],
        {"policy": "flashprefill", "alpha": 0.5, "sink_blocks": 1, "window_blocks": 2},
    ),
    "chunks": (
        [
            "--chunked-prefill-size", "512", "--enable-mixed-chunk", "--page-size", "16",
            "--max-total-tokens", "6144",
        ],
        {"policy": "dense"},
    ),
}  # fmt: skip


async def ask(session, ids, new):
    body = {
        "input_ids": ids, "return_logprob": True, "top_logprobs_num": 2,
        "sampling_params": {"max_new_tokens": new, "temperature": 0, "ignore_eos": True},
    }  # fmt: skip
    async with session.post(f"{URL}/generate", json=body) as response:
        if response.status != 200:
            raise RuntimeError(await response.text())
        found = await response.json()
    best = found["meta_info"]["output_top_logprobs"]
    assert len(best) == new, found["meta_info"]["finish_reason"]
    return found["output_ids"], [sorted((one[0] for one in two), reverse=True) for two in best]


async def counted(session):
    """What the plugin counted, by the server's own door."""
    async with session.get(f"{URL}/server_info") as response:
        return (await response.json())["internal_states"][0]["flashprefill"]


def prompts_of(way):
    """Tokens at random; in chunks each prompt begins as the one before it, for the radix cache."""
    prompts = [tokens(n, n) for n in soaking.LENGTHS]
    if way == "chunks":
        prompts = [(a[: len(a) // 2] + b)[: len(b)] for a, b in zip([[], *prompts], prompts, strict=False)]
    return prompts


def main():
    parser = soaking.parser(__doc__, "llama")
    parser.add_argument("--way", default="whole", choices=WAYS)
    options = parser.parse_args()
    arguments, policy = WAYS[options.way]
    start = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(options.model)]
    engine = soaking.Engine(
        name="sglang",
        packages=("sglang",),
        command=[*start, *PLAIN, *arguments],
        environment=plugin.config(**policy, log_seconds=30),
        url=URL,
        prompts=prompts_of(options.way),
        ask=ask,
        dtype="float32",
        settings={"model": Path(options.model).name, "arguments": arguments, "policy": policy},
        counted=counted,
    )

    def what_is_wrong(counts):
        plugins = counts["plugin"]
        fine = not plugins["fallbacks"] and (plugins["density"] == 1.0) == (options.way == "chunks")
        return [] if fine else ["the plugin was not what it should be"]

    soaking.run(engine, options, what_is_wrong)


if __name__ == "__main__":
    main()
