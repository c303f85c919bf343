#!/usr/bin/env bash
# Sets SGLang up on a CPU in a folder of its own and runs the plugin's tests in it. The engine is kept there: the first
# run downloads and installs 3 GB. This tree's package lies beside it, in build/, so trees may share an engine.
#   FLASHPREFILL_ENGINES  the folder of all engines; default: build/engines
#   --short               one prompt of the real model, soaks of 20 seconds. May come before the others.
#   --setup               the engine only, no test
#   --python              the Python of that folder with the other arguments (for bench/sglang/ttft.py, soak.py)
#   others                go to pytest: --soak 600 for seconds of a soak
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
wanted=$(cat "$here/requirements.txt" "$here/requirements-alone.txt")
short=(--prompts 1 --soak 20)

install() {
  pip install -r "$here/requirements.txt"
  pip install --no-deps -r "$here/requirements-alone.txt"
}

settings() {
  # Without its kernels SGLang takes a CPU for an unknown GPU unless it is told.
  export SGLANG_USE_CPU_ENGINE=1 PYTHONPATH=$PYTHONPATH:$here/stand_ins
}

. "$here/../common/environment.sh"
run_in_engine "$@"
