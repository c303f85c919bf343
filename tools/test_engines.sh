#!/usr/bin/env bash
# Tests the plugins inside their engines: every tests/engines/*/run.sh, or only those that are named as arguments; what
# follows them and begins with a dash goes to the scripts (ggml --short). Each sets its engine up in a folder of its own
# (in FLASHPREFILL_ENGINES, default build/engines) and ends with pytest's lines.
set -uo pipefail
cd "$(dirname "$0")/.."
engines=()
while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do engines+=("$1"); shift; done
[ ${#engines[@]} -gt 0 ] || for script in tests/engines/*/run.sh; do engines+=("$(basename "$(dirname "$script")")"); done
failed=()
for engine in "${engines[@]}"; do
  echo "== $engine"
  "tests/engines/$engine/run.sh" "$@" || failed+=("$engine")
done
[ ${#failed[@]} -eq 0 ] || { echo "test-engines: failed in ${failed[*]}" >&2; exit 1; }
