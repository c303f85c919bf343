#!/usr/bin/env bash
# Installs the build into a temporary prefix, builds the examples against that with find_package, and runs them.
# Arguments: build folder, source folder.
set -euo pipefail
build=$1 source=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cmake --install "$build" --prefix "$work/prefix" > /dev/null
cmake -S "$source/examples" -B "$work/examples" -DCMAKE_PREFIX_PATH="$work/prefix" -DCMAKE_BUILD_TYPE=Release > /dev/null
cmake --build "$work/examples" > /dev/null
"$work/examples/prefill_c"
"$work/examples/prefill_cpp"
