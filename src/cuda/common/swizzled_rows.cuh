// Rows of 16-bit values in panels of swizzled rows in shared memory, copied 16 bytes per thread from wherever they lie.
// For kernels whose rows come one by one (pages of any size, the last rows of a sequence) and whose products are small:
// no producer warp, no tensor maps; several CTAs per multiprocessor hide each other's waits. The product of two such
// sets is PanelProduct, sm90/panel_product.cuh or sm80/panel_product.cuh.
#ifndef FLASHPREFILL_CUDA_COMMON_SWIZZLED_ROWS_CUH_
#define FLASHPREFILL_CUDA_COMMON_SWIZZLED_ROWS_CUH_

#include "cuda/common/ptx.cuh"

namespace flashprefill::cuda {

constexpr int kPanelAlign = 1024;
constexpr int kPanelThreads = 128; // one warpgroup
constexpr int kPanelRowBytes = 128;
constexpr int kProductRows = 64; // of A; a warp has 16

template <int PANELS, int ROWS>
constexpr int kPanelBytes = PANELS* ROWS* kPanelRowBytes;

// Dynamic shared memory from the next multiple of kPanelAlign on: ask for as much more.
__device__ __forceinline__ char* AlignedPanels(char* raw) {
  return raw + (kPanelAlign - SharedAddress(raw) % kPanelAlign) % kPanelAlign;
}

// Starts the copies of ROWS rows; address(i) is row i's first element, or null for zeros. Columns past head_dim, a
// multiple of 8, are zeros.
template <int PANELS, int ROWS, typename Address>
__device__ __forceinline__ void CopyRows(char* to, int head_dim, const void* anywhere, Address&& address) {
  constexpr int kChunks = PANELS * 8; // of 16 bytes per row: a power of two
  const int chunk = threadIdx.x % kChunks;
  const uint32_t panel = SharedAddress(to) + chunk / 8 * (ROWS * kPanelRowBytes);
#pragma unroll 4
  for (int row = threadIdx.x / kChunks; row < ROWS; row += kPanelThreads / kChunks) {
    const auto* const from = address(row);
    const bool valid = from != nullptr && chunk * 8 < head_dim;
    AsyncCopy16(panel + row * kPanelRowBytes + (chunk % 8 ^ row % 8) * 16,
                valid ? static_cast<const void*>(from + chunk * 8) : anywhere, valid);
  }
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_SWIZZLED_ROWS_CUH_
