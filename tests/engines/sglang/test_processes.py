"""What needs all of an Engine's processes: tensor parallelism, a missing library, a server's information."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from answers import tokens

import flashprefill
from flashprefill import sglang as plugin

SCRIPT = """
import json, sys
import sglang

def main():
    model, arguments, ids = json.loads(sys.argv[1])
    engine = sglang.Engine(
        model_path=model, device="cpu", attention_backend="torch_native", skip_tokenizer_init=True,
        dtype="float32", max_total_tokens=8192, mem_fraction_static=0.3, max_running_requests=4,
        chunked_prefill_size=600, random_seed=1, log_level="info", **arguments,
    )
    sampling = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    outputs = engine.generate(input_ids=ids, sampling_params=sampling)
    states = engine.get_server_info()["internal_states"]
    print("RESULT", json.dumps([[o["output_ids"] for o in outputs], states[0].get("flashprefill")]))
    engine.shutdown()

if __name__ == "__main__":
    main()
"""


def run(folder, model, arguments, ids, policy=None, **environment):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    kept = {name: value for name, value in os.environ.items() if name != "FLASHPREFILL_SGLANG"}
    done = subprocess.run(
        [sys.executable, script, json.dumps([str(model), arguments, ids])],
        env={**kept, **(policy or {}), **environment}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    answers, numbers = json.loads(line.removeprefix("RESULT"))
    return answers, numbers, log


def prompts():
    return [tokens(1500, 1), tokens(300, 2)]


def test_tensor_parallel(tmp_path, llama):
    """Two processes with half of the heads each, over gloo; the server's information is the first one's."""
    cores = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    stock, nothing, _ = run(tmp_path, llama, {"tp_size": 2}, prompts(), **cores)
    ours, numbers, log = run(tmp_path, llama, {"tp_size": 2}, prompts(), plugin.config("dense"), **cores)
    assert ours == stock and nothing is None
    assert numbers["sparse_rows"] == 1800 and numbers["density"] == 1.0 and not numbers["fallbacks"]
    assert log.count("3 of 3 layers of a kind read prompts with") == 2


def test_without_its_library_the_engine_is_dense(tmp_path, llama):
    """The package as it is after a failed build: everything but the library."""
    package = Path(flashprefill.__file__).parent
    shutil.copytree(package, tmp_path / "flashprefill", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    stock, _, _ = run(tmp_path, llama, {}, prompts())
    paths = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"  # the entry point stays where it is
    environment = {"PYTHONPATH": paths, "FLASHPREFILL_LIBRARY": ""}
    broken, numbers, log = run(tmp_path, llama, {}, prompts(), plugin.config("dense"), **environment)
    assert broken == stock and numbers is None
    assert "flashprefill cannot load its library" in log
