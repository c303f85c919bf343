// Heaviest first: sorts query tiles by the number of blocks that they keep, between select and attend.
//
// A chunk of 8,192 rows has 2,048 tiles for 132 CTAs, and one tile may keep ten times as many blocks as another. In
// their natural order the last tiles to be taken may be long ones, and the chip waits for them. So long tiles are taken
// first and short ones last, by classes of half octaves: then the end of the work is as level as the shortest class is
// short. Inside a class the natural order stays, in which neighbours share keys in L2. A tile is computed by one CTA
// whatever its place is, so results keep their bits.
//
// One CTA sorts by counting, and fetches all items' counts at once. On an H200 it adds 4 us to an operator of 256 items
// and up to 13 us to one of 2,048.
#include "cuda/common/attend/order.h"
#include "cuda/common/attend/tiles.cuh"
#include "cuda/common/grid_control.cuh"
#include "cuda/common/launch.h"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kClasses = 64; // two per octave, the largest counts first

__device__ __forceinline__ int ClassOf(int count) {
  const int octave = 31 - __clz(max(1, count));
  const int upper_half = octave > 0 ? count >> (octave - 1) & 1 : 0;
  return kClasses - 1 - (2 * octave + upper_half);
}

// EACH: items of a thread, at most.
template <int EACH>
__global__ void __launch_bounds__(kThreads, 1)
    OrderKernel(const __grid_constant__ AttendArgs p, const int32_t* counts, int* order) {
  extern __shared__ int row_of_tile[];    // of the mask
  __shared__ int place[kClasses][kWarps]; // a warp's items of a class; then those of the warps before it
  __shared__ int class_begin[kClasses];   // items of a class; then those of the classes before it
  GridRelease();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < kClasses * kWarps; i += kThreads) (&place[0][0])[i] = 0;
  GridWait();
  if (threadIdx.x == 0) *p.counter = 0;

  const int tiles = TilesOfBatch(p);
  const int in_tile = p.mask_heads * p.section_heads;
  // Whatever the device's lengths say, nothing lies outside of the host's arrays.
  const int max_tiles = p.ordered_items / (p.kv_heads * p.mask_heads);
  const int items = min(tiles * p.kv_heads * p.mask_heads, p.ordered_items);
  // A warp has a stretch of items, so that places inside a class follow the natural order.
  const int first = warp * ((items + kThreads - 1) / kThreads * 32) + lane;
  const int end = min(items, (warp + 1) * ((items + kThreads - 1) / kThreads * 32));
  int class_of[EACH], rank[EACH];

  const auto find_rows = [&] {
    for (int tile = warp; tile < min(tiles, max_tiles); tile += kWarps) {
      int sequence, from_end;
      FindTile(p, tile, &sequence, &from_end);
      const int m = max(0, TilesOf(p, QueryLength(p, sequence)) - 1 - from_end);
      if (lane == 0) row_of_tile[tile] = p.by_tile(QueryBegin(p, sequence)) + sequence + m;
    }
  };
  const auto classify = [&] {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int item = first + 32 * i;
      class_of[i] = -1;
      if (item >= end) continue;
      const int section = item / (tiles * in_tile);
      const int in_section = item - section * tiles * in_tile;
      const int tile = p.by_in_tile(in_section);
      const int head = section * in_tile + in_section - tile * in_tile;
      const int64_t row = head * p.tile_rows + row_of_tile[min(tile, max_tiles - 1)];
      class_of[i] = ClassOf(row < p.mask_heads * p.kv_heads * p.tile_rows ? __ldg(counts + row) : 0);
    }
  };
  const auto count_in_warp = [&] {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int mine = class_of[i];
      const uint32_t alike = __match_any_sync(~0u, mine);
      const int before = __popc(alike & ((1u << lane) - 1));
      rank[i] = mine < 0 ? 0 : place[mine][warp] + before;
      __syncwarp();
      if (mine >= 0 && before == 0) place[mine][warp] += __popc(alike);
      __syncwarp();
    }
  };
  const auto sum_over_lanes = [&](int value) { // of the lanes up to this one
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int below = __shfl_up_sync(~0u, value, d);
      if (lane >= d) value += below;
    }
    return value;
  };
  const auto add_up = [&] {
    for (int c = warp; c < kClasses; c += kWarps) {
      const int mine = place[c][lane];
      const int sum = sum_over_lanes(mine);
      place[c][lane] = sum - mine;
      if (lane == 31) class_begin[c] = sum;
    }
    __syncthreads();
    if (warp == 0) {
      const int low = class_begin[2 * lane], both = low + class_begin[2 * lane + 1];
      const int begin = sum_over_lanes(both) - both;
      class_begin[2 * lane] = begin;
      class_begin[2 * lane + 1] = begin + low;
    }
    __syncthreads();
  };

  find_rows();
  __syncthreads();
  classify();
  count_in_warp();
  __syncthreads();
  add_up();
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    if (class_of[i] >= 0) order[class_begin[class_of[i]] + place[class_of[i]][warp] + rank[i]] = first + 32 * i;
  }
}

} // namespace

cudaError_t LaunchOrder(const AttendArgs& a, const int32_t* counts, int* order, bool overlaps, cudaStream_t stream) {
  const int max_tiles = a.ordered_items / (a.kv_heads * a.mask_heads);
  const auto kernel = a.ordered_items > kMaxOrderedItems ? OrderKernel<kMaxOrderedItemsPortable / kThreads>
                                                         : OrderKernel<kMaxOrderedItems / kThreads>;
  return LaunchOverlapped(kernel, overlaps, 1, kThreads, max_tiles * static_cast<int>(sizeof(int)), stream, a, counts,
                          order);
}

} // namespace flashprefill::cuda
