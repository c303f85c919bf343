// Heaviest first: the order of query tiles where a CTA gets only a few of them.
#ifndef FLASHPREFILL_CUDA_COMMON_ATTEND_ORDER_H_
#define FLASHPREFILL_CUDA_COMMON_ATTEND_ORDER_H_

#include "cuda/common/attend/args.h"

namespace flashprefill::cuda {

// Items (query tiles of all heads) beyond which no order is made. On Hopper a CTA then gets more than 60 of them, so
// that the end of the work is level anyway, and what neighbours share in L2 is worth more. The portable kernels' CTAs
// are twice as many and four times as slow: at 64K tokens one tile of a dense tail takes a quarter of the whole time,
// and L2 is not what they wait for.
constexpr int kMaxOrderedItems = 8192, kMaxOrderedItemsPortable = 32768;

// Items times keys below which none is made: its own 4 us or more are then worth more than a level end. 4,096 tokens of
// 32 heads have 4.2 million.
constexpr int64_t kMinOrderedWork = 8 << 20;

// Writes the permutation of items that AttendArgs::order describes, and sets the counter to 0. `counts` as in
// fp_block_mask; its contents decide nothing but the order. The kernel lets the next one on the stream start. If it
// `overlaps`, it is launched while the one before it, a select's last, still runs, and waits for it.
cudaError_t LaunchOrder(const AttendArgs& a, const int32_t* counts, int* order, bool overlaps, cudaStream_t stream);

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ATTEND_ORDER_H_
