#!/bin/sh
# Builds libattend_harness.so (the attend kernel behind two C functions) for attend_check.py and attend_bench.py:
#   sh bench/cuda/build_harness.sh OUTPUT_FOLDER        needs nvcc 12.4 or newer; no GPU
# Then, on a machine with a Hopper GPU and PyTorch:   ATTEND_LIB=OUTPUT_FOLDER python3 bench/cuda/attend_check.py all
set -e
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/../.."
flags="-std=c++20 -Isrc -Iinclude"
for source in src/cuda/sm90/attend_*.cu; do
  nvcc $flags -O3 -gencode=arch=compute_90a,code=sm_90a -Xptxas -v -Xcompiler -fPIC -c "$source" \
    -o "$out/$(basename "$source" .cu).o"
done
for source in src/cuda/attend.cc src/cuda/common/tensor_map.cc bench/cuda/attend_harness.cc; do
  nvcc $flags -O2 -Xcompiler -fPIC,-fvisibility=hidden -c "$source" -o "$out/$(basename "$source" .cc).o"
done
nvcc -shared -cudart static -Xcompiler -static-libstdc++,-static-libgcc -o "$out/libattend_harness.so" "$out"/*.o -ldl -lrt -lpthread
