// Rows of 16-bit values in shared memory as wgmma reads them, copied 16 bytes per thread from wherever they lie, and
// the product of two such sets. For kernels whose rows come one by one (pages of any size, the last rows of a sequence)
// and whose products are small: no producer warp, no tensor maps; several CTAs per multiprocessor hide each other's
// waits.
#ifndef FLASHPREFILL_CUDA_COMMON_SWIZZLED_ROWS_CUH_
#define FLASHPREFILL_CUDA_COMMON_SWIZZLED_ROWS_CUH_

#include "cuda/common/wgmma.cuh"

namespace flashprefill::cuda {

constexpr int kPanelThreads = 128; // one warpgroup
constexpr int kPanelRowBytes = 128;
constexpr int kProductRows = 64; // of A; a warp has 16

template <int PANELS, int ROWS>
constexpr int kPanelBytes = PANELS* ROWS* kPanelRowBytes;

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

// d = A B^T: 64 rows of A, COLUMNS rows of B. All threads of the CTA; the copies are complete and fenced. meanwhile()
// is called while the matrix units work.
template <typename T, int PANELS, int COLUMNS, typename Meanwhile>
__device__ __forceinline__ void MultiplyPanels(float (&d)[COLUMNS / 2], const char* a, const char* b,
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

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_SWIZZLED_ROWS_CUH_
