// The kernel in front of an attend that follows no select: it sets the counter of tiles handed out to 0. A kernel and
// not a memset, because attend may be launched while it runs: some 2 us less between the two.
#include <atomic>

#include "cuda/common/attend/args.h"
#include "cuda/common/grid_control.cuh"
#include "cuda/common/launch.h"

namespace flashprefill::cuda {
namespace {

__global__ void StartKernel(int* counter) {
  GridRelease();
  *counter = 0;
}

} // namespace

// Any kernel tells: all of those that are compiled for every architecture have the same ones.
bool GridsOverlap() {
  constexpr int kDevices = 64;
  static std::atomic<int8_t> known[kDevices]; // 0: not asked yet, else 1 + the answer
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (device < kDevices && known[device]) return known[device] == 2;
  cudaFuncAttributes attributes{};
  const bool asked = cudaFuncGetAttributes(&attributes, StartKernel) == cudaSuccess;
  const bool overlap = asked && attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
  if (device < kDevices && asked) known[device] = overlap ? 2 : 1;
  return overlap;
}

cudaError_t LaunchAttendStart(int* counter, cudaStream_t stream) {
  StartKernel<<<1, 1, 0, stream>>>(counter);
  return cudaGetLastError();
}

} // namespace flashprefill::cuda
