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
cmake --preset release -Wno-dev > /dev/null
mapfile -t sources < <(git ls-files 'src/core/*.cc' 'src/reference/*.cc')
# PyPI's clang-tidy comes without clang's own stddef.h and friends; GCC's serve as well.
gcc_headers=$(g++ -print-file-name=include)
$bin/clang-tidy --quiet -p build/release --extra-arg=-isystem"$gcc_headers" "${sources[@]}"
echo "check: all clean"
