#!/usr/bin/env bash
# The C++ tests under AddressSanitizer + UndefinedBehaviorSanitizer (GCC) and under ThreadSanitizer. GCC's OpenMP runtime
# is opaque to TSan, so that build uses clang and LLVM's runtime, whose Archer tool tells TSan about its barriers.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh clang-14 libclang-rt-14-dev libomp-14-dev
jobs=$(nproc)

cmake --preset asan -Wno-dev > /dev/null
cmake --build --preset asan
ctest --test-dir build/asan -L sanitize --output-on-failure -j "$jobs"

cmake --preset tsan -Wno-dev > /dev/null
cmake --build --preset tsan
archer=$(find /usr/lib/llvm-14/lib -name 'libarcher.so' | head -n 1)
omp=$(find /usr/lib/llvm-14/lib -name 'libomp.so.5' | head -n 1)
LD_PRELOAD=$omp OMP_TOOL_LIBRARIES=$archer TSAN_OPTIONS=ignore_noninstrumented_modules=1 \
  ctest --test-dir build/tsan -L sanitize --output-on-failure -j "$jobs"
