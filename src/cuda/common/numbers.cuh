// Numbers on the device: conversions of the 16-bit types, sums and maxima over a warp, sums of exponentials.
#ifndef FLASHPREFILL_CUDA_COMMON_NUMBERS_CUH_
#define FLASHPREFILL_CUDA_COMMON_NUMBERS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace flashprefill::cuda {

__device__ inline float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float ToFloat(__half x) { return __half2float(x); }

template <typename T>
__device__ T FromFloat(float x);
template <>
__device__ inline __nv_bfloat16 FromFloat(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half FromFloat(float x) {
  return __float2half_rn(x);
}

__device__ inline bool IsFinite(float x) { return fabsf(x) < INFINITY; }

// 2^100. A kernel that adds up exponentials against a reference that is not the maximum moves the reference where a
// thread's sum passes this: some hundred million such sums still fit a float.
constexpr float kLargeSum = 1.2e30f;

__device__ inline float WarpSum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

__device__ inline float WarpMax(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_NUMBERS_CUH_
