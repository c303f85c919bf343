#!/usr/bin/env bash
# Runs every fuzz target under libFuzzer with ASan and UBSan, so many seconds each (60), and stops at the first finding,
# which is left in build/fuzz/findings. What was learned stays in build/fuzz/corpus for the next run.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
tools/setup.sh clang-14 libclang-rt-14-dev libomp-14-dev

cmake --preset fuzz -Wno-dev > /dev/null
cmake --build --preset fuzz
mkdir -p build/fuzz/findings
for target in build/fuzz/tests/fuzz/fuzz_*; do
  [ -x "$target" ] && [ -f "$target" ] || continue
  name=$(basename "$target")
  mkdir -p "build/fuzz/corpus/$name"
  echo "$name: $seconds seconds"
  "$target" -max_total_time="$seconds" -max_len=512 -len_control=0 -rss_limit_mb=4096 -timeout=20 -verbosity=0 \
    -print_final_stats=1 -artifact_prefix=build/fuzz/findings/ "build/fuzz/corpus/$name"
done
echo "fuzz: no finding"
