// The kernel in front of an attend that follows no select: it sets the counter of tiles handed out to 0. A kernel and
// not a memset, because attend may be launched while it runs: some 2 us less between the two.
#include "cuda/sm90/attend/params.h"

namespace flashprefill::cuda {
namespace {

__global__ void StartKernel(int* counter) {
  cudaTriggerProgrammaticLaunchCompletion();
  *counter = 0;
}

} // namespace

cudaError_t LaunchAttendStart(int* counter, cudaStream_t stream) {
  StartKernel<<<1, 1, 0, stream>>>(counter);
  return cudaGetLastError();
}

} // namespace flashprefill::cuda
