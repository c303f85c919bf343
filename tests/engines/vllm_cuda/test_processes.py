"""What needs processes of its own: a separate engine, a server, several GPUs, an engine of another version.

Each starts a script (../vllm/apart.py) or vLLM's server with a model's folder, and compares its tokens with
those of an engine whose process has no plugin (VLLM_PLUGINS).
"""

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import apart
import pytest
from answers import tokens
from engine import CUDA, KIND
from test_layers import DTYPE, NEAR, length

import flashprefill
from flashprefill import vllm as plugin

IDS = [tokens(length(7000), 1), tokens(length(5000), 2)]
OPTIONS = {
    "dtype": DTYPE, "max_model_len": length(16000), "kv_cache_memory_bytes": 1 << 28,
    "max_num_batched_tokens": 4096 if CUDA else 2048, **KIND,
}  # fmt: skip
OURS = {**apart.COUNTED, "additional_config": plugin.config("dense")}
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # starts in half the time
if not CUDA:
    ENVIRONMENT["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


def run(folder, model, options, **environment):
    return apart.run(folder, model, {**OPTIONS, **options}, IDS, 8, **{**ENVIRONMENT, **environment})


def assert_alike(stock, ours):
    """Tokens are equal up to one where the stock engine's two best were near each other."""
    for (a, gaps), (b, _) in zip(stock, ours, strict=True):
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        assert first is None or gaps[first][0] - gaps[first][1] < NEAR, (first, gaps, a, b)


@pytest.fixture(scope="module")
def stock(tmp_path_factory, llama):
    """A function that returns the stock engine's answers; its process runs beside the first test's."""
    with ThreadPoolExecutor(1) as pool:
        here = tmp_path_factory.mktemp("stock")
        asked = pool.submit(run, here, llama, {}, VLLM_PLUGINS="none", **ONE_PROCESS)
        yield lambda: asked.result()[0]


def test_a_separate_engine(tmp_path, llama, stock):
    ours, (stats,), log = run(tmp_path, llama, OURS)
    assert_alike(stock(), ours)
    assert stats["density"] == 1.0 and not stats["fallbacks"]
    assert stats["sparse_rows"] + stats["dense_rows"].get("short", 0) == sum(map(len, IDS))
    assert "read prompts with dense" in log


def test_two_workers(tmp_path, llama, stock):
    import torch

    if CUDA and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ours, stats, _ = run(tmp_path, llama, {**OURS, "tensor_parallel_size": 2})
    assert_alike(stock(), ours)
    assert len(stats) == 2 and stats[0] == stats[1]
    assert stats[0]["density"] == 1.0 and stats[0]["sparse_rows"] > 0


def test_an_engine_of_another_version(tmp_path, llama, stock):
    """One line, and a working dense engine: the package, but for the versions that it knows."""
    package = Path(flashprefill.__file__).parent
    shutil.copytree(package, tmp_path / "flashprefill", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    host = tmp_path / "flashprefill/vllm/host.py"
    host.write_text(host.read_text() + '\nhost.supported = ("0.31",)\n')
    paths = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    config = {"additional_config": {"flashprefill": True}}
    ours, _, log = run(tmp_path, llama, config, PYTHONPATH=paths, **ONE_PROCESS)
    assert_alike(stock(), ours)
    assert "the plugin knows 0.31 only" in log


def free_port():
    with contextlib.closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextlib.contextmanager
def server(model, folder, *options):
    """vllm serve; gives a function that posts JSON to a path, the log, the port."""
    port, log = free_port(), folder / "server.log"
    # vllm-cpu comes without the metadata that `vllm serve` asks for; the older door needs none.
    door = ["cli.main", "serve", str(model)] if CUDA else ["openai.api_server", "--model", str(model)]
    settings = {
        "host": "127.0.0.1", "port": port, "served_model_name": "m", "dtype": DTYPE,
        "max_model_len": length(16000), "kv_cache_memory_bytes": 1 << 28, **KIND,
    }  # fmt: skip
    command = [sys.executable, "-m", f"vllm.entrypoints.{door[0]}", *door[1:], "--skip-tokenizer-init"]
    command += ["--enforce-eager"]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", str(value)]

    def post(path, body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *options],
            env={**os.environ, **ENVIRONMENT},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-6000:]
                with (
                    contextlib.suppress(OSError),
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5),
                ):
                    break
                time.sleep(0.5)
            yield post, log, port
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def served(tmp_path_factory, llama):
    """A server with the plugin: what posts to it, its log, its port."""
    options = json.dumps({"flashprefill": {"policy": "dense", "log_seconds": 0}})
    with server(llama, tmp_path_factory.mktemp("server"), "--additional-config", options) as all_of_it:
        yield all_of_it


def completion(ids, new, **more):
    """The body of a request for so many tokens."""
    asked = {"model": "m", "prompt": ids, "max_tokens": new, "temperature": 0, "ignore_eos": True}
    return {**asked, "return_token_ids": True, **more}


def answered(post, ids):
    return [post("/v1/completions", completion(ids, 8))["choices"][0]["token_ids"], []]


def test_a_server(served, stock):
    """Completions of token ids over loopback HTTP, and the line of statistics in the server's log."""
    post, log, _ = served
    answers = [answered(post, ids) for ids in [*IDS, IDS[0]]]
    assert_alike(stock(), answers[:2])
    text = log.read_text()
    assert "read prompts with dense" in text
    assert "chunks sparse at density 1.000" in text


def test_clients_that_leave(served, stock):
    """One while its prompt is read, one while its answer comes: no work is left, and others are answered."""
    post, _, port = served

    def running():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))

    def leave(ids, until):
        body = json.dumps(completion(ids, length(8000), stream=True)).encode()
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        until(client)
        client.close()

    beside = []

    def first_tokens(client):
        answer = client.getresponse()
        assert answer.status == 200 and answer.readline().startswith(b"data:")
        beside.append(answered(post, IDS[0]))
        assert running(), "its answer was to come all the time"

    leave(tokens(length(7900), 3), lambda client: time.sleep(0.05))
    leave(IDS[1], first_tokens)
    end = time.monotonic() + 10
    while running() and time.monotonic() < end:
        time.sleep(0.1)
    assert not running()
    assert_alike(stock(), [answered(post, ids) for ids in IDS])
    assert_alike(stock()[:1], beside)
