// The product of two sets of swizzled rows by one warpgroup, with wgmma.
#ifndef FLASHPREFILL_CUDA_SM90_PANEL_PRODUCT_CUH_
#define FLASHPREFILL_CUDA_SM90_PANEL_PRODUCT_CUH_

#include "cuda/common/swizzled_rows.cuh"
#include "cuda/common/wgmma.cuh"

namespace flashprefill::cuda {

struct PanelProductSm90 {
  template <int PANELS>
  static constexpr int kStages = 2; // of rows of A

  // After a thread's copies, before the product's barrier.
  static __device__ __forceinline__ void Fence() { FenceAsyncProxy(); }

  // d = A B^T: 64 rows of A, COLUMNS rows of B. All threads of the CTA; the copies are complete and fenced. meanwhile()
  // is called while the matrix units work.
  template <typename T, int PANELS, int COLUMNS, typename Meanwhile>
  static __device__ __forceinline__ void Multiply(float (&d)[COLUMNS / 2], const char* a, const char* b,
                                                  Meanwhile&& meanwhile) {
    const uint64_t left = DescribeKMajor(SharedAddress(a)), right = DescribeKMajor(SharedAddress(b));
    WgmmaFence();
#pragma unroll
    for (int slice = 0; slice < 4 * PANELS; ++slice) { // 16 columns: 32 bytes; addresses count in units of 16
      Wgmma<T>::SS(d, left + slice / 4 * (kProductRows * kPanelRowBytes / 16) + slice % 4 * 2,
                   right + slice / 4 * (COLUMNS * kPanelRowBytes / 16) + slice % 4 * 2, slice > 0);
    }
    WgmmaCommit();
    meanwhile();
    WgmmaWait<0>();
    KeepInPlace(d);
  }
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_PANEL_PRODUCT_CUH_
