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
# All of src and of the plugin's parts that need no engine's headers; CUDA's own sources are nvcc's.
mapfile -t sources < <(git ls-files 'src/core/*.cc' 'src/reference/*.cc' 'src/cpu/*.cc' 'src/methods/*.cc' 'integrations/ggml/options.cc' \
  'integrations/ggml/key_order.cc' 'integrations/ggml/mask_runs.cc' ':!src/methods/*/cuda.cc' ':!src/methods/*_test.cc')
# PyPI's clang-tidy comes without clang's own stddef.h and friends; GCC's serve as well.
gcc_headers=$(g++ -print-file-name=include)
# It counts what it left out, headers' warnings among them, for each file.
$bin/clang-tidy --quiet -p build/release --extra-arg=-isystem"$gcc_headers" "${sources[@]}" \
  2> >(grep -vE '^[0-9]+ warnings? generated\.$' >&2)
echo "check: all clean"
