// The key list of a query tile: where it lies, which of its keys the tile's rows see, and whether some may lie in
// blocks that are kept. By a whole warp. Counts are clamped; keys are not trusted to ascend, so that whoever reads one
// checks it.
#ifndef FLASHPREFILL_CUDA_COMMON_ATTEND_TILE_LIST_CUH_
#define FLASHPREFILL_CUDA_COMMON_ATTEND_TILE_LIST_CUH_

#include "cuda/common/attend/tiles.cuh"

namespace flashprefill::cuda {

struct TileList {
  const int32_t* keys;
  int safe;  // keys that every row of the tile sees: the list's first ones
  int end;   // and with those behind them that only some rows see
  int check; // whether some of them may lie in kept blocks
};

// How many of `count` ascending keys are below `limit`.
__device__ __forceinline__ int CountBelow(const int32_t* keys, int count, int limit) {
  if (count == 0 || __ldg(keys + count - 1) < limit) return count;
  int low = 0, high = count; // it is one of low .. high - 1
  while (true) {
    const int apart = (high - low + 31) / 32, probe = low + static_cast<int>(threadIdx.x % 32) * apart;
    const int below = __popc(__ballot_sync(~0u, probe < high && __ldg(keys + min(probe, count - 1)) < limit));
    if (below == 0 || apart == 1) return low + below;
    high = min(high, low + below * apart);
    low += (below - 1) * apart + 1;
    if (low >= high) return low;
  }
}

// Whether a block is kept from that of key `first` to that of key `last`.
__device__ __forceinline__ int AnyKept(const AttendArgs& p, const Work& work, int first, int last) {
  const int begin = p.by_block(ClampTo(first, work.k_len - 1));
  const int end = p.by_block(ClampTo(last, work.k_len - 1)) + 1;
  bool any = false;
  for (int index = begin / 64 + threadIdx.x % 32; index * 64 < end; index += 32) {
    uint64_t word = MaskWord(p, work, index);
    if (index == begin / 64) word &= ~uint64_t{0} << begin % 64;
    if (end - index * 64 < 64) word &= (uint64_t{1} << (end - index * 64)) - 1;
    any |= word != 0;
  }
  return __any_sync(~0u, any);
}

// Whether the tile keeps all blocks that it sees.
__device__ __forceinline__ bool KeepsAll(const AttendArgs& p, const Work& work) {
  int kept = 0;
  for (int index = threadIdx.x % 32; index * 64 < work.visible; index += 32) {
    kept += __popcll(MaskWord(p, work, index));
  }
  return __reduce_add_sync(~0u, kept) == work.visible;
}

__device__ __forceinline__ TileList FindList(const AttendArgs& p, const ListArgs& a, const Work& work) {
  TileList list{};
  if (p.bits == nullptr || work.k_len == 0) return list;
  const int segment =
      a.by_segment_tokens(QueryBegin(p, work.sequence)) + work.sequence + a.by_segment_tiles(p.by_tile(work.begin));
  const int32_t* const at = a.lists + (work.head / p.heads_per_tile * a.segment_rows + segment) * a.stride;
  list.keys = at + 2;
  list.end = CountBelow(list.keys, ClampTo(__ldg(at), a.max_keys), VisibleKeys(p, work));
  list.safe = CountBelow(list.keys, list.end, min(work.first_position + 1, work.k_len));
  if (list.end > 0) list.check = AnyKept(p, work, __ldg(list.keys), __ldg(list.keys + list.end - 1));
  return list;
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ATTEND_TILE_LIST_CUH_
