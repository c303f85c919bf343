#!/usr/bin/env bash
# RULER's tasks on SmolLM2 at 2K, 4K and 8K, 25 prompts per task, dense attention and every policy that selects on the GPU:
# the table of docs/quality.md. A 135M model leaves a GPU idle while Python thinks, so six processes with two tasks each
# share it, and their results are joined. More of them only wait for each other's turn on the GPU. The longest prompts come
# first: there the policies differ most.
#
#     bench/eval_h200.sh OUT [more arguments of eval, like --model PATH]
#     python tools/quality.py OUT/results.json h200
#
# SAMPLES, LENGTHS, PATTERNS, POLICIES, MAX_TOKENS, TASKS (a process's tasks joined by commas) and DEVICE change what is
# run. A run that was stopped goes on when it is called again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: bench/eval_h200.sh OUT [arguments of flashprefill eval]}
shift
python=${PYTHON:-python3}
tasks=${TASKS:-niah_multiquery,niah_single_1 niah_multivalue,niah_single_2 niah_multikey_3,niah_multikey_1
  niah_single_3,cwe niah_multikey_2,fwe vt}
arguments=(--pattern "${PATTERNS:-all}" --lengths "${LENGTHS:-8K,4K,2K}" --samples "${SAMPLES:-25}"
  --max-tokens "${MAX_TOKENS:-64}" --device "${DEVICE:-cuda}" --threads 1 "$@")
candidates="sketch(gain=0.0025, query_metric=True, outliers=6, query_pool=64);flashprefill(query_pool=16)"
IFS=';' read -ra policies <<< "${POLICIES-$candidates}"
for policy in "${policies[@]}"; do arguments+=(--policy "$policy"); done
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

mkdir -p "$out"
pids=()
for some in $tasks; do
  name=${some%%,*}
  "$python" -m flashprefill eval "$some" "${arguments[@]}" --out "$out/$name" > "$out/$name.log" 2>&1 &
  pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
[ $failed = 0 ] || tail -n 3 "$out"/*.log
parts=()
for some in $tasks; do [ ! -f "$out/${some%%,*}/results.json" ] || parts+=("$out/${some%%,*}/results.json"); done
"$python" "$here/join_eval.py" "${parts[@]}" --out "$out"
exit $failed
