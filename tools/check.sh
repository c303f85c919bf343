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
$bin/clang-tidy --quiet -p build/release "${sources[@]}"
echo "check: all clean"
