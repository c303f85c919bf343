// Rows of 16-bit values as the pooling passes read them: 16 bytes per thread, and the mean of consecutive rows.
#ifndef FLASHPREFILL_CUDA_COMMON_ENERGIES_POOL_ROWS_CUH_
#define FLASHPREFILL_CUDA_COMMON_ENERGIES_POOL_ROWS_CUH_

#include <cstdint>

#include "cuda/common/numbers.cuh"

namespace flashprefill::cuda {

constexpr int kColumns = 8; // of a thread: 16 bytes

template <typename T>
union Chunk {
  uint4 raw;
  T value[kColumns];
};

// Eight consecutive columns from `column` on, as far as the row has them. VECTOR: one aligned load.
template <typename T, bool VECTOR>
__device__ inline Chunk<T> LoadChunk(const T* row, int column, int head_dim, int64_t stride) {
  Chunk<T> chunk;
  if constexpr (VECTOR) {
    chunk.raw = __ldg(reinterpret_cast<const uint4*>(row + column));
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      chunk.value[i] = column + i < head_dim ? row[(column + i) * stride] : FromFloat<T>(0.f);
    }
  }
  return chunk;
}

template <typename T>
__device__ inline uint4 Rounded(const float (&x)[kColumns]) {
  Chunk<T> chunk;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) chunk.value[i] = FromFloat<T>(x[i]);
  return chunk.raw;
}

// Adds COUNT rows to sums of eight columns, and steps over them. All loads come before the first is used.
template <typename T, bool VECTOR, int COUNT>
__device__ inline void AddRows(const T*& row, int64_t row_stride, int column, int head_dim, int64_t stride,
                               float (&sum)[kColumns]) {
  Chunk<T> chunk[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    chunk[i] = LoadChunk<T, VECTOR>(row, column, head_dim, stride);
    row += row_stride;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) sum[k] += ToFloat(chunk[i].value[k]);
  }
}

// The mean of `count` rows, eight columns of it, not rounded. There is one path for eight rows and one for a single
// one: a path for the remaining rows, with a condition at each load, was measured to spill registers in all of them.
template <typename T, bool VECTOR>
__device__ inline void MeanOfRows(const T* row, int64_t row_stride, int count, int column, int head_dim, int64_t stride,
                                  float (&mean)[kColumns]) {
  constexpr int kInFlight = VECTOR ? 8 : 1; // loads of 16 bytes
#pragma unroll
  for (int k = 0; k < kColumns; ++k) mean[k] = 0;
  int left = count;
#pragma unroll 1
  for (; left >= kInFlight; left -= kInFlight) {
    AddRows<T, VECTOR, kInFlight>(row, row_stride, column, head_dim, stride, mean);
  }
#pragma unroll 1
  for (; left > 0; --left) AddRows<T, VECTOR, 1>(row, row_stride, column, head_dim, stride, mean);
  const float share = __frcp_rn(static_cast<float>(count));
#pragma unroll
  for (int k = 0; k < kColumns; ++k) mean[k] *= share;
}

// The second-order factor of Sketch's spread: squares of a rounded row, times `scale`.
template <typename T>
__device__ inline void ScaledSquares(float (&x)[kColumns], float scale) {
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    const float rounded = ToFloat(FromFloat<T>(x[k]));
    x[k] = rounded * rounded * scale;
  }
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ENERGIES_POOL_ROWS_CUH_
