// Tile scheduler: one warp takes the next query tile (common/attend/tiles.cuh has their order) and hands it to those
// that load it.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_TILE_SCHEDULER_CUH_
#define FLASHPREFILL_CUDA_SM90_ATTEND_TILE_SCHEDULER_CUH_

#include "cuda/sm90/attend/shared_memory.cuh"

namespace flashprefill::cuda {

// One warp takes tiles, one ahead of those that load them: its arithmetic and its loads are some thousands of cycles.
// Its state is in shared memory, to spare registers.
template <class Memory>
__device__ __forceinline__ void StartTaking(const AttendArgs& p, Memory& sm) {
  const int tiles = TilesOfBatch(p);
  if (threadIdx.x % 32 == 0) {
    sm.tiles_of_batch = tiles;
    sm.next_item = blockIdx.x;
    sm.next_parity = 1; // the first wait passes
  }
  __syncwarp();
}

// False if there was none left, which the loaders are told. Every lane arrives where it has written, and theirs where
// they have read: one arrival for a warp would do, but racecheck doesn't see that. find(work) is called for a tile that
// there is, write() when what loaders read may be overwritten.
template <class Memory, class Find, class Write>
__device__ __forceinline__ bool TakeTile(const AttendArgs& p, Memory& sm, Find&& find, Write&& write) {
  const int lane = threadIdx.x % 32;
  const int item = sm.next_item, tiles = sm.tiles_of_batch;
  const bool there = item < tiles * p.kv_heads * p.mask_heads;
  Work w;
  uint64_t word = 0;
  if (there) {
    w = DecodeItem(p, item < p.ordered_items ? p.order[item] : item, tiles);
    word = MaskWord(p, w, max(0, (w.visible - 1) / kGroupBlocks) * 32 + lane);
    find(w);
  } else {
    w.sequence = -1;
  }
  BarrierWait(&sm.work_empty, sm.next_parity);
  __syncwarp(); // all have read the parity
  sm.words[lane] = word;
  write();
  if (lane == 0) {
    sm.work = w;
    sm.next_parity ^= 1;
  }
  BarrierArrive(&sm.work_full);
  if (there && lane == 0) sm.next_item = atomicAdd(p.counter, 1) + static_cast<int>(gridDim.x);
  __syncwarp();
  return there;
}

template <class Memory>
__device__ __forceinline__ bool TakeTile(const AttendArgs& p, Memory& sm) {
  return TakeTile(
      p, sm, [](const Work&) {}, [] {});
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_TILE_SCHEDULER_CUH_
