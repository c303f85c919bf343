// Launches of kernels, from the host. Plain C++.
#ifndef FLASHPREFILL_CUDA_COMMON_LAUNCH_H_
#define FLASHPREFILL_CUDA_COMMON_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flashprefill::cuda {

// Multiprocessors of the current device.
inline cudaError_t CountProcessors(int* processors) {
  int device = 0;
  if (cudaError_t e = cudaGetDevice(&device)) return e;
  return cudaDeviceGetAttribute(processors, cudaDevAttrMultiProcessorCount, device);
}

// Lets a kernel use `bytes` of dynamic shared memory.
template <typename... Params>
cudaError_t AllowShared(void (*kernel)(Params...), int bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              bytes);
}

// The same, and lets as many CTAs share a multiprocessor as there is room for: left to itself the driver gives a part
// of the memory to the L1 cache.
template <typename... Params>
cudaError_t AllowSharedOnly(void (*kernel)(Params...), int bytes) {
  if (cudaError_t e = AllowShared(kernel, bytes)) return e;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout,
                              cudaSharedmemCarveoutMaxShared);
}

// Whether launches may overlap on the current device: whether it runs code of this library that was made for sm_90 or
// later (grid_control.cuh), which is not so below Hopper, nor where a driver has compiled sm_80's PTX.
bool GridsOverlap();

// A launch that, if it `overlaps` and the device can, may start while the kernel before it on the stream ends. A kernel
// launched so waits for that one itself (cudaGridDependencySynchronize), in all of its CTAs: else it could be done
// before it.
template <typename... Params>
cudaError_t LaunchOverlapped(void (*kernel)(Params...), bool overlaps, int64_t grid, int threads, int bytes,
                             cudaStream_t stream, const Params&... params) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = overlaps && GridsOverlap() ? 1 : 0; // below Hopper there is no such attribute
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&params))...};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_LAUNCH_H_
