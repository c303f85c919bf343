// Rows of Q as they come, in 16 bits, on their way to int8: values, and the largest of a row.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_ROWS16_CUH_
#define FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_ROWS16_CUH_

#include <type_traits>

#include "cuda/common/ptx.cuh"

namespace flashprefill::cuda {

// Eight values of 16 bits.
template <class T>
__device__ __forceinline__ void Unpack8(const uint4& raw, float (&x)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
  }
}

// The largest magnitude of a row, of which four lanes have a quarter each, but not so small that products of scales
// would vanish. Magnitudes of floats order as their bits do, and what is not finite comes last. What is 2^126 or more
// counts as that: the fast division knows no larger divisors.
template <class T>
__device__ __forceinline__ float LargestOfRow(const uint4 (&raw)[4], bool* finite) {
  constexpr uint32_t kTooLarge = std::is_same_v<T, __nv_bfloat16> ? 0x7e80 : 0x7c00;
  uint32_t two = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    two = __vmaxu2(__vmaxu2(two, raw[i].x & 0x7fff7fffu), raw[i].y & 0x7fff7fffu);
    two = __vmaxu2(__vmaxu2(two, raw[i].z & 0x7fff7fffu), raw[i].w & 0x7fff7fffu);
  }
  two = __vmaxu2(two, __shfl_xor_sync(~0u, two, 1));
  two = __vmaxu2(two, __shfl_xor_sync(~0u, two, 2));
  const uint32_t most = max(two & 0xffff, two >> 16);
  *finite = most < kTooLarge;
  float x[8];
  Unpack8<T>(uint4{most, 0, 0, 0}, x);
  return fmaxf(x[0], 1e-15f);
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_ROWS16_CUH_
