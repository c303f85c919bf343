#!/usr/bin/env bash
# The NEON kernels against the reference: cross-compiled with Debian's compiler, a small matrix of cases under qemu-user.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh g++-aarch64-linux-gnu qemu-user googletest

# Highway and GoogleTest are headers and sources that fit any processor; their folders must not bring /usr/include along.
mkdir -p build/arm-include
ln -sfn /usr/include/hwy build/arm-include/hwy
cmake -S . -B build/arm -G Ninja -Wno-dev -DCMAKE_BUILD_TYPE=Release -DFLASHPREFILL_TESTS=ON \
  -DCMAKE_TOOLCHAIN_FILE="$PWD/cmake/toolchains/aarch64-linux-gnu.cmake" \
  -DHIGHWAY_INCLUDE_DIR="$PWD/build/arm-include" -DFLASHPREFILL_GTEST_SOURCE=/usr/src/googletest > /dev/null
cmake --build build/arm --target flashprefill_tests
qemu-aarch64 -L /usr/aarch64-linux-gnu build/arm/tests/flashprefill_tests --small
