// Programmatic dependent launch from the device's side: the wait for the kernel before this one, and the leave for the
// one after it to start. The instructions are Hopper's and later; below it, and in code that a driver makes of sm_80's
// PTX, there are none, and launches don't overlap (GridsOverlap of launch.h).
#ifndef FLASHPREFILL_CUDA_COMMON_GRID_CONTROL_CUH_
#define FLASHPREFILL_CUDA_COMMON_GRID_CONTROL_CUH_

namespace flashprefill::cuda {

// The kernel before this one on the stream has ended, and what it wrote is there.
__device__ __forceinline__ void GridWait() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// The next kernel on the stream may take its place as soon as there is room.
__device__ __forceinline__ void GridRelease() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_GRID_CONTROL_CUH_
