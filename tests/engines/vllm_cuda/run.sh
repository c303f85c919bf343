#!/usr/bin/env bash
# Runs this folder's tests on a machine with a GPU, where vLLM 0.32 and flashprefill (built for CUDA) are installed.
# Elsewhere they are skipped, with a line that says why.
#   --site FILE  first unpack FILE, which archive.py made elsewhere, and use what is in it: nothing has to be installed
#   --bench      bench/vllm/gpu.py with the other arguments, in place of the tests
#   others       go to pytest: -k v2-eager-16; --rehearse: on vLLM's CPU backend
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false VLLM_USE_FLASHINFER_SAMPLER=0
if [ "${1:-}" = --site ]; then
  site=$(realpath "$2").unpacked
  if [ ! -e "$site/.complete" ]; then
    mkdir -p "$site"
    # Not every machine has xz.
    python3 -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), sys.stdout.buffer)' "$2" |
      tar -C "$site" -xf -
    touch "$site/.complete"
  fi
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  shift 2
fi
if [ "${1:-}" = --bench ]; then
  shift
  exec "${PYTHON:-python3}" "$here/../../../bench/vllm/gpu.py" "$@"
fi
if ! "${PYTHON:-python3}" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("vllm") and u.find_spec("pytest")))'; then
  echo "skipped: needs vLLM and pytest in ${PYTHON:-python3}"
  exit 0
fi
cd "$here"
exec "${PYTHON:-python3}" -m pytest -p no:cacheprovider --rootdir "$here" -ra "$@"
