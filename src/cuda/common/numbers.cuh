// Numbers on the device: conversions of the 16-bit types, sums and maxima over a warp, sums of exponentials.
#ifndef FLASHPREFILL_CUDA_COMMON_NUMBERS_CUH_
#define FLASHPREFILL_CUDA_COMMON_NUMBERS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

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

// Four floats as e4m3, the first in the lowest byte. What is too large becomes 448, NaN stays.
__device__ __forceinline__ uint32_t PackE4M3(float a, float b, float c, float d) {
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
}

// Four floats of at most 127 as int8, rounded to nearest even, the first in the lowest byte: added to 1.5 * 2^23 a
// float's last byte is the integer's.
__device__ __forceinline__ uint32_t PackInt8(float a, float b, float c, float d) {
  constexpr float kMagic = 12582912.0f;
  const uint32_t low = __byte_perm(__float_as_uint(a + kMagic), __float_as_uint(b + kMagic), 0x0040);
  const uint32_t high = __byte_perm(__float_as_uint(c + kMagic), __float_as_uint(d + kMagic), 0x0040);
  return __byte_perm(low, high, 0x5410);
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
