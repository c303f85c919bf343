#!/usr/bin/env bash
# Sets SGLang up on a CPU in a folder of its own and runs the plugin's tests in it. The engine is kept there: the first
# run downloads and installs 3 GB. This tree's package lies beside it, in build/, so trees may share an engine.
#   FLASHPREFILL_ENGINES  the folder of all engines; default: build/engines
#   --short               one prompt of the real model, soaks of 20 seconds. May come before the others.
#   --setup               the engine only, no test
#   --python              the Python of that folder with the other arguments (for bench/sglang/ttft.py, soak.py)
#   others                go to pytest: --soak 600 for seconds of a soak
set -euo pipefail
root=$(cd "$(dirname "$0")/../../.." && pwd)
here=$root/tests/engines/sglang
folder=${FLASHPREFILL_ENGINES:-$root/build/engines}/sglang
ours=$root/build/engine-tests/sglang
python=$folder/venv/bin/python
few=()
if [ "${1:-}" = --short ]; then
  few=(--prompts 1 --soak 20)
  shift
fi
mkdir -p "$folder" "$ours"

# The stamp holds what the environment was made from. One set-up at a time.
wanted=$(cat "$here"/requirements*.txt)
exec 9> "$folder/lock"
flock 9
if [ "$(cat "$folder/venv/made-from" 2> /dev/null)" != "$wanted" ]; then
  rm -rf "$folder/venv"
  "${PYTHON:-python3}" -m venv "$folder/venv"
  $python -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
  $python -m pip install --quiet --disable-pip-version-check --no-deps -r "$here/requirements-alone.txt"
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
# Without its kernels SGLang takes a CPU for an unknown GPU unless it is told.
export SGLANG_USE_CPU_ENGINE=1 FLASHPREFILL_MODELS=$folder/models
export PYTHONPATH=$here:$root/tests/engines/common:$here/stand_ins:$ours/site
if [ "${1:-}" = --python ]; then
  shift
  exec "$python" "$@"
fi
cd "$here"
exec "$python" -m pytest -p no:cacheprovider --rootdir "$here" -ra "${few[@]}" "$@"
