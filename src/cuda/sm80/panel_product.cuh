// The product of two sets of swizzled rows by four warps, those of a warpgroup, with mma.sync.
#ifndef FLASHPREFILL_CUDA_SM80_PANEL_PRODUCT_CUH_
#define FLASHPREFILL_CUDA_SM80_PANEL_PRODUCT_CUH_

#include "cuda/common/swizzled_rows.cuh"
#include "cuda/sm80/mma.cuh"

namespace flashprefill::cuda {

struct PanelProductPortable {
  template <int PANELS>
  static constexpr int kStages = PANELS == 4 ? 1 : 2; // of rows of A: 99 KiB must do

  // After a thread's copies, before the product's barrier.
  static __device__ __forceinline__ void Fence() {}

  // d = A B^T: 64 rows of A, of which a warp has 16, COLUMNS rows of B. All threads of the CTA; the copies are
  // complete. meanwhile() is called before the product: it starts copies.
  template <typename T, int PANELS, int COLUMNS, typename Meanwhile>
  static __device__ __forceinline__ void Multiply(float (&d)[COLUMNS / 2], const char* a, const char* b,
                                                  Meanwhile&& meanwhile) {
    meanwhile();
#pragma unroll
    for (float& x : d) x = 0;
    const uint32_t left = RowsOfA(SharedAddress(a), static_cast<int>(threadIdx.x / 32 % 4) * 16);
    const uint32_t right = RowsOfB(SharedAddress(b), 0);
#pragma unroll
    for (int slice = 0; slice < 4 * PANELS; ++slice) {
      uint32_t rows[4];
      LoadMatrix4(rows, Piece(left, slice) + slice / 4 * kPanelBytes<1, kProductRows>);
#pragma unroll
      for (int n = 0; n < COLUMNS / 16; ++n) {
        uint32_t columns[4];
        LoadMatrix4(columns, Piece(right, slice) + slice / 4 * kPanelBytes<1, COLUMNS> + n * 16 * kRowBytes);
        Mma<T>(d + 8 * n, rows, columns[0], columns[1]);
        Mma<T>(d + 8 * n + 4, rows, columns[2], columns[3]);
      }
    }
  }
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM80_PANEL_PRODUCT_CUH_
