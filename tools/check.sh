#!/usr/bin/env bash
# Formatting, linting and types over the whole tree; with --fix, formatting is applied instead of checked.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
mapfile -t cxx < <(git ls-files '*.h' '*.hpp' '*.cc' '*.c' '*.cu' '*.cuh')
if [ "${1:-}" = --fix ]; then
  $bin/clang-format -i "${cxx[@]}"
  $bin/ruff check --fix .
  $bin/ruff format .
  exit
fi
$bin/clang-format --dry-run --Werror "${cxx[@]}"
$bin/ruff check .
$bin/ruff format --check .
$bin/mypy
$bin/python tools/check_structure.py
cmake --preset release -Wno-dev > /dev/null
# PyPI's clang-tidy comes without clang's own headers, and intrinsics want those of the very version: Debian's.
tools/setup.sh libclang-common-14-dev
headers=$(echo /usr/lib/llvm-14/lib/clang/14*/include)
# It counts what it left out, headers' warnings among them, for each file.
tidy() { $bin/clang-tidy --quiet --extra-arg=-isystem"$headers" "$@" 2> >(grep -vE '^[0-9]+ warnings? generated\.$' >&2); }
# All of src but nvcc's sources, and what of the plugin needs no engine's headers.
mapfile -t sources < <(git ls-files 'src/*.cc' ':!src/cuda' ':!src/methods/*/cuda.cc' ':!src/methods/*_test.cc')
tidy -p build/release "${sources[@]}"
tidy integrations/ggml/{options,key_order,mask_runs}.cc -- -std=c++20 -Iinclude -Iintegrations/ggml
echo "check: all clean"
