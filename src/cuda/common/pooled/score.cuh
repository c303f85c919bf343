// Products of pooled rows with mean keys, as they come, in device memory: N^2 / 2 small products of means that lie in
// L2, for every GPU since Ampere.
//
//     D[64 key blocks, 64 rows of each band] = K[64, d] . Q[rows, d]^T
//
// A CTA is one warpgroup with a panel of rows of one head, and steps over the key blocks that they see. A band's rows
// are the same rows with zeros in the other dimensions, so both bands read the same keys. Eight lanes store eight
// neighbouring blocks of a row, a whole sector.
#ifndef FLASHPREFILL_CUDA_COMMON_POOLED_SCORE_CUH_
#define FLASHPREFILL_CUDA_COMMON_POOLED_SCORE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>

#include "cuda/common/launch.h"
#include "cuda/common/pooled/args.h"
#include "cuda/common/swizzled_rows.cuh"

namespace flashprefill::cuda {
namespace {

// Both halves of a 32-bit word of two elements, if the two lowest bits say so.
__device__ __forceinline__ uint32_t TwoElements(uint32_t bits) {
  return (bits & 1 ? 0xffffu : 0) | (bits & 2 ? 0xffff0000u : 0);
}

template <class PRODUCT, typename T, int PANELS, int BANDS>
struct PooledPanel {
  static constexpr int kColumns = BANDS * kPanelRows;
  static constexpr int kRowBytes = kPanelBytes<PANELS, kColumns>, kStageBytes = kPanelBytes<PANELS, kProductRows>;
  static constexpr int kStages = PRODUCT::template kStages<PANELS>; // of keys
  static constexpr int kBytes = kRowBytes + kStages * kStageBytes;
  static constexpr int kChunks = PANELS * 8; // of 16 bytes per row

  const PooledShape& a;
  DeviceSequence s;
  int head, panel, first, rows; // of the sequence's rows
  const T* keys;
  char* shared;

  __device__ bool Place(char* memory) {
    const Problem& p = a.d.p;
    panel = a.end_panel - 1 - static_cast<int>(blockIdx.x); // the last rows see the most
    head = blockIdx.y;
    shared = memory;
    if (IsSkipped(a, head)) return false;
    s = SequenceAt(a.d, SequenceOfSlot(p.batch, panel, [&](int b) { return PanelBase(a, b); }));
    first = (panel - PanelBase(a, s.index)) * kPanelRows;
    rows = min(kPanelRows, PooledRows(a, s) - first);
    if (first < 0 || rows <= 0 || KeepsEverything(p, a.rules, s)) return false;
    const int kv = head / (p.q_heads / p.kv_heads);
    keys = static_cast<const T*>(a.k_means) + (kv * a.mean_rows + MeanBase(p, s, a.rules.block_size)) * a.pitch;
    return true;
  }

  // Each row once per band, with zeros in the dimensions that the band has not.
  __device__ void MakeRows() {
    const T* const from =
        static_cast<const T*>(a.q_rows) + (int64_t{head} * a.row_room + RowBase(a, s.index) + first) * a.pitch;
    const int chunk = threadIdx.x % kChunks;
    char* const to = shared + chunk / 8 * (kColumns * kPanelRowBytes);
    for (int row = threadIdx.x / kChunks; row < kPanelRows; row += kPanelThreads / kChunks) {
      uint4 raw{};
      if (row < rows && chunk * 8 < a.pitch) {
        raw = *reinterpret_cast<const uint4*>(from + int64_t{row} * a.pitch + chunk * 8);
      }
#pragma unroll
      for (int band = 0; band < BANDS; ++band) {
        const uint32_t dims = a.bands.dims[band][chunk / 4] >> (chunk % 4 * 8);
        const uint4 masked{raw.x & TwoElements(dims), raw.y & TwoElements(dims >> 2), raw.z & TwoElements(dims >> 4),
                           raw.w & TwoElements(dims >> 6)};
        const int column = band * kPanelRows + row;
        *reinterpret_cast<uint4*>(to + column * kPanelRowBytes + (chunk % 8 ^ column % 8) * 16) = masked;
      }
    }
  }

  __device__ void CopyKeys(int step) {
    const int blocks = s.Blocks(a.rules);
    CopyRows<PANELS, kProductRows>(shared + kRowBytes + step % kStages * kStageBytes, a.pitch, keys, [&](int c) {
      const int block = step * kProductRows + c;
      return block < blocks ? keys + int64_t{block} * a.pitch : nullptr;
    });
  }

  __device__ void Store(int step, const float (&d)[kColumns / 2]) {
    const int lane = threadIdx.x % 32, block = step * kProductRows + threadIdx.x / 32 * 16 + lane / 4;
    if (block >= a.logit_stride) return; // which is a multiple of 16
    float* const to = LogitsOf(a, head, panel, 0, 0) + block;
#pragma unroll
    for (int i = 0; i < kColumns / 2;
         ++i) { // column i / 4 * 8 + .., of both bands one after the other, and 8 blocks on
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (column % kPanelRows < rows) to[column * a.logit_stride + i / 2 % 2 * 8] = d[i];
    }
  }

  __device__ void Run() {
    MakeRows();
    const int steps = (SeenByRow(a, s, first + rows - 1) + kProductRows - 1) / kProductRows;
    CopyKeys(0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      float d[kColumns / 2];
      AsyncCopyWaitAll();
      PRODUCT::Fence();
      __syncthreads();
      const char* const of_step = shared + kRowBytes + step % kStages * kStageBytes;
      const auto next = [&] {
        if (step + 1 < steps) CopyKeys(step + 1);
      };
      if constexpr (kStages > 1) {
        PRODUCT::template Multiply<T, PANELS, kColumns>(d, of_step, shared, next);
      } else {
        PRODUCT::template Multiply<T, PANELS, kColumns>(d, of_step, shared, [] {});
        __syncthreads();
        next();
      }
      Store(step, d);
    }
  }
};

template <class PRODUCT, typename T, int PANELS, int BANDS>
__global__ void __launch_bounds__(kPanelThreads) PooledScoreKernel(const __grid_constant__ PooledShape shape) {
  extern __shared__ char raw[];
  PooledPanel<PRODUCT, T, PANELS, BANDS> panel{shape};
  if (panel.Place(AlignedPanels(raw))) panel.Run();
}

template <class PRODUCT, typename T, int PANELS, int BANDS>
cudaError_t LaunchPooledScoreOf(const PooledShape& shape, cudaStream_t stream) {
  constexpr int kBytes = PooledPanel<PRODUCT, T, PANELS, BANDS>::kBytes + kPanelAlign;
  const auto kernel = PooledScoreKernel<PRODUCT, T, PANELS, BANDS>;
  if (cudaError_t e = AllowSharedOnly(kernel, kBytes)) return e;
  const dim3 grid(static_cast<unsigned>(shape.end_panel - shape.first_panel), static_cast<unsigned>(shape.d.p.q_heads));
  kernel<<<grid, kPanelThreads, kBytes, stream>>>(shape);
  return cudaGetLastError();
}

template <class PRODUCT, typename T, int BANDS>
cudaError_t LaunchPooledScoreBands(const PooledShape& shape, cudaStream_t stream) {
  return shape.pitch <= 64    ? LaunchPooledScoreOf<PRODUCT, T, 1, BANDS>(shape, stream)
         : shape.pitch <= 128 ? LaunchPooledScoreOf<PRODUCT, T, 2, BANDS>(shape, stream)
                              : LaunchPooledScoreOf<PRODUCT, T, 4, BANDS>(shape, stream);
}

template <class PRODUCT>
cudaError_t LaunchPooledScoreWith(const PooledShape& shape, cudaStream_t stream) {
  if (shape.d.p.q.dtype == FP_BF16) {
    return shape.bands.count == 1 ? LaunchPooledScoreBands<PRODUCT, __nv_bfloat16, 1>(shape, stream)
                                  : LaunchPooledScoreBands<PRODUCT, __nv_bfloat16, 2>(shape, stream);
  }
  return shape.bands.count == 1 ? LaunchPooledScoreBands<PRODUCT, __half, 1>(shape, stream)
                                : LaunchPooledScoreBands<PRODUCT, __half, 2>(shape, stream);
}

} // namespace
} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_POOLED_SCORE_CUH_
