// Softmax over rows of scores as a warp holds them: 16 rows, columns in groups of 8. Lane l has of each group the
// values s[0], s[1] of row l/4 and s[2], s[3] of row l/4 + 8, columns 2 (l%4) and the next: the accumulators of wgmma
// and of mma.sync alike, so that Hopper's kernel and the portable one share this.
//
// Weights are exponentials against a reference that a row keeps, the maximum of its first scores, for as long as its
// sums stay in range.
#ifndef FLASHPREFILL_CUDA_COMMON_ATTEND_ROW_MATH_CUH_
#define FLASHPREFILL_CUDA_COMMON_ATTEND_ROW_MATH_CUH_

#include <type_traits>

#include "cuda/common/ptx.cuh"

namespace flashprefill::cuda {

// The limit of a lane's sum of weights in a step, of up to 32 of them. fp16 weights end at 65504; fp32 sums, and bf16
// weights, bear much more without loss.
template <class T>
constexpr float kLargestSum = std::is_same_v<T, __half> ? 0x1p15f : 0x1p40f;

// The weights, packed, and their sum, of GROUPS groups of columns.
template <class T, int GROUPS>
__device__ __forceinline__ void Weigh(const float* s, float exponent_scale, const float (&reference)[2], uint32_t* to,
                                      float (&part)[2]) {
#pragma unroll
  for (int i = 0; i < GROUPS; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float low = Exp2(fmaf(s[4 * i + 2 * r], exponent_scale, -reference[r]));
      const float high = Exp2(fmaf(s[4 * i + 2 * r + 1], exponent_scale, -reference[r]));
      part[r] += low;
      part[r] += high;
      to[2 * i + r] = Pack<T>(low, high);
    }
  }
}

// Moves the reference of each row that `moves` names to its maximum. Whether a row moves depends on that row alone,
// so its results are the same bits whatever else is in the tile. grow: by what the row's sums are to be multiplied.
template <int GROUPS>
__device__ __forceinline__ void FollowMaxima(const float* s, int moves, float exponent_scale, float bias,
                                             float (&max)[2], float (&grow)[2]) {
  constexpr int kChains = GROUPS < 4 ? GROUPS : 4; // not one: a step of a chain takes 4 cycles or more
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float t[kChains];
#pragma unroll
    for (int c = 0; c < kChains; ++c) t[c] = fmaxf(s[4 * c + 2 * r], s[4 * c + 2 * r + 1]);
#pragma unroll
    for (int i = kChains; i < GROUPS; ++i) {
      t[i % kChains] = fmaxf(t[i % kChains], fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
    }
    float top = fmaxf(t[0], t[1]);
    if constexpr (kChains == 4) top = fmaxf(top, fmaxf(t[2], t[3]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2)) + bias;
    const bool grows = moves >> r & 1 && top > max[r];
    grow[r] = grows ? Exp2((max[r] - top) * exponent_scale) : 1.0f;
    max[r] = grows ? top : max[r];
  }
}

// The references of rows' scores, scaled; a row may have seen nothing yet. bias_log2: of columns that count for
// several.
__device__ __forceinline__ void References(const float (&max)[2], float exponent_scale, float bias_log2,
                                           float (&reference)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) reference[r] = max[r] == -INFINITY ? 0 : fmaf(max[r], exponent_scale, -bias_log2);
}

// Normalises COUNT packed pairs of output and packs them; sums become the rows'. A row that saw nothing gets zeros.
template <class T, int COUNT>
__device__ __forceinline__ void PackOutput(const float* o, float (&sum)[2], uint32_t* out) {
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    inverse[r] = __fdividef(1, sum[r]);
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const uint32_t packed = Pack<T>(o[2 * i] * inverse[i % 2], o[2 * i + 1] * inverse[i % 2]);
    out[i] = sum[i % 2] == 0 ? 0 : packed;
  }
}

// A row's logarithm of the sum of exponentials, natural, from its reference and sum.
__device__ __forceinline__ float LogSum(float max, float sum, float exponent_scale) {
  constexpr float kLn2 = 0.693147180559945f;
  return sum == 0 ? -INFINITY : fmaf(max, exponent_scale, __log2f(sum)) * kLn2;
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ATTEND_ROW_MATH_CUH_
