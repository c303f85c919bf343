"""What needs processes of their own: tensor parallelism, a missing library, a server's workers."""

import os
import shutil
from pathlib import Path

import apart

import flashprefill.vllm

OPTIONS = {
    "dtype": "float32", "max_model_len": 4096, "kv_cache_memory_bytes": 1 << 27, "max_num_batched_tokens": 600
}  # fmt: skip


def run(folder, model, options, ids, **environment):
    """`apart.run`, and of the answers the tokens."""
    answers, stats, log = apart.run(folder, model, {**OPTIONS, **options}, ids, 6, **environment)
    return [tokens for tokens, _ in answers], stats, log


def prompts():
    from answers import tokens

    return [tokens(1500, 1), tokens(300, 2)]


def test_tensor_parallel_and_its_workers_counters(tmp_path, llama):
    """Two workers with half of the heads each, in processes of their own."""
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    stock, _, _ = run(tmp_path, llama, {}, prompts(), VLLM_PLUGINS="none")
    options = {
        "tensor_parallel_size": 2,
        **apart.COUNTED,
        "additional_config": flashprefill.vllm.config("dense"),
    }
    ours, stats, log = run(tmp_path, llama, options, prompts(), **more)
    assert ours == stock
    assert len(stats) == 2 and all(one["sparse_rows"] == 1800 and one["density"] == 1.0 for one in stats)
    assert "sparse at density 1.000" in log


def test_speculative_rows(tmp_path, llama):
    """Drafts to be verified are rows of a request that generates: the engine's."""
    # A token is looked up in the prompt by itself, since what random weights generate is no phrase of it.
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }
    options = {"speculative_config": speculative, **apart.COUNTED}
    repeated = prompts()[1][:50] * 20
    ids = [repeated, prompts()[0]]
    stock, _, _ = run(tmp_path, llama, {"speculative_config": speculative}, ids, VLLM_PLUGINS="none")
    options["additional_config"] = flashprefill.vllm.config("dense")
    ours, (stats,), _ = run(tmp_path, llama, options, ids)
    assert ours == stock
    # The last piece of a prompt may be shorter than a tile.
    assert stats["sparse_rows"] + stats["dense_rows"].get("short", 0) == 2500
    assert stats["sparse_rows"] > 2000
    assert stats["dense_rows"].get("speculative", 0) > 0


def test_without_its_library_the_engine_is_dense(tmp_path, llama):
    """The package as it is after a failed build: everything but the library."""
    package = Path(flashprefill.__file__).parent
    shutil.copytree(package, tmp_path / "flashprefill", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    stock, _, _ = run(tmp_path, llama, {}, prompts(), VLLM_PLUGINS="none")
    paths = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"  # the entry point stays where it is
    environment = {"PYTHONPATH": paths, "FLASHPREFILL_LIBRARY": ""}
    broken, _, log = run(
        tmp_path, llama, {"additional_config": {"flashprefill": True}}, prompts(), **environment
    )
    assert broken == stock
    assert "flashprefill cannot load its library" in log
