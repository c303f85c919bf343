#!/usr/bin/env bash
# Runs fuzz targets so many seconds each (60) and stops at the first finding, which is left in build/fuzz/findings. What was
# learned stays in build/fuzz/corpus for the next run, which also begins with the small corpus of tests/fuzz/corpus.
#   tools/fuzz.sh [SECONDS [TARGET...]]      all targets if none is named
# Targets in C++ run under libFuzzer with ASan and UBSan; readers in Python under atheris where PyPI has it for this
# Python, else under their own mutator alone.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
shift || true
tools/setup.sh clang-14 libclang-rt-14-dev libomp-14-dev

cmake --preset fuzz -Wno-dev > /dev/null
cmake --build --preset fuzz
cmake --preset release -Wno-dev > /dev/null
cmake --build --preset release --target flashprefill
export PYTHONPATH=$PWD/python:$PWD/build/fuzz/python FLASHPREFILL_LIBRARY=$PWD/build/release/libflashprefill.so
python=.venv/bin/python
$python -c 'import atheris' 2> /dev/null ||
  $python -m pip install --quiet --disable-pip-version-check --only-binary :all: --no-deps --target build/fuzz/python atheris ||
  echo "fuzz: no atheris for this Python, so readers' mutations do not follow coverage"
mapfile -t targets < <(cd build/fuzz/tests/fuzz && find . -maxdepth 1 -name 'fuzz_*' -type f -executable -printf '%f\n' | sort)
mapfile -t -O ${#targets[@]} targets < <($python tests/fuzz/readers.py --list)
[ $# = 0 ] || targets=("$@")

mkdir -p build/fuzz/findings
for name in "${targets[@]}"; do
  corpus=build/fuzz/corpus/$name
  mkdir -p "$corpus"
  echo "$name: $seconds seconds"
  options=(-max_total_time="$seconds" -len_control=0 -rss_limit_mb=6000 -verbosity=0 -print_final_stats=1
    -artifact_prefix="build/fuzz/findings/$name-")
  if [ -x "build/fuzz/tests/fuzz/$name" ]; then
    "build/fuzz/tests/fuzz/$name" "${options[@]}" -max_len=512 -timeout=20 "$corpus" "tests/fuzz/corpus/$name"
  else
    $python tests/fuzz/readers.py --seconds "$seconds" "$name" -- "${options[@]}" -max_len=4096 -timeout=60 "$corpus"
  fi
done
echo "fuzz: no finding"
