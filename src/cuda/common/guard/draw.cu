// Which rows are audited: those that core/audit.cc draws for the same mask. A CTA per sequence and mask head lists the
// tiles that leave something out, a tile per thread: most of them do so in the first word. All of them but the
// sequence's last have equally many rows, so that a number among their rows tells tile and row.
//
// And for masks with key lists, which keys they keep for each row, as bits: a CTA per row, through shared memory.
#include "cuda/common/grid_control.cuh"
#include "cuda/common/guard/args.h"
#include "cuda/common/launch.h"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kMarkThreads = 128, kMarkKeys = 1 << 15; // whose bits lie in shared memory at a time: 4 KiB

__device__ bool LeavesOut(const uint64_t* row, int visible) {
  constexpr int kAtOnce = 4;
  for (int first = 0; first * 64 < visible; first += kAtOnce) {
    uint64_t missing = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int w = first + i;
      if (w * 64 < visible) missing |= GuardVisible(~row[w], w, visible);
    }
    if (missing) return true;
  }
  return false;
}

__global__ void __launch_bounds__(kThreads) DrawKernel(const __grid_constant__ GuardArgs a) {
  __shared__ int before_warp[kWarps + 1];
  GridWait();
  GridRelease();
  if (GuardSkips(a)) return;
  const Problem& p = a.d.p;
  const TileRules& r = a.rules;
  const int b = static_cast<int>(blockIdx.x) / a.mask_heads, mask_head = static_cast<int>(blockIdx.x) % a.mask_heads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const DeviceSequence s = SequenceAt(a.d, b);
  const int tiles = s.Tiles(r);
  const int64_t base = int64_t{mask_head} * r.tile_rows + s.TileBase(r);
  if (a.seed.draw == 0 && threadIdx.x == 0) {
    if (mask_head == 0) a.heads_done[b] = 0;
    if (blockIdx.x == 0) *a.any_wanted = 0;
    a.wanted[blockIdx.x] = 0;
  }

  int listed = 0; // sparse tiles so far
  bool last = false;
  for (int first = 0; first < tiles; first += kThreads) {
    const int m = first + static_cast<int>(threadIdx.x);
    const bool sparse = m < tiles && LeavesOut(a.bits + (base + m) * a.words, TileAt(p, r, s, m).visible);
    const uint32_t votes = __ballot_sync(~0u, sparse);
    if (lane == 0) before_warp[warp + 1] = __popc(votes);
    if (threadIdx.x == 0) before_warp[0] = 0;
    __syncthreads();
    int before = listed;
    for (int w = 0; w <= warp; ++w) before += before_warp[w];
    if (sparse) a.sparse_tiles[base + before + __popc(votes & ((1u << lane) - 1))] = m;
    for (int w = 0; w <= kWarps; ++w) listed += before_warp[w];
    last |= __syncthreads_or(sparse && m == tiles - 1);
  }
  const int missing = last ? tiles * r.tile_tokens - s.q_len : 0; // rows that the last tile has not
  const int64_t sparse = int64_t{listed} * r.tile_tokens - missing;
  const int64_t strata = min(GuardRowsOf(a.rows, p.causal, s.q_len, s.k_len), sparse);
  for (int i = threadIdx.x; i < r.heads_per_tile * strata; i += kThreads) {
    const int head = mask_head * r.heads_per_tile + static_cast<int>(i / strata), j = static_cast<int>(i % strata);
    const int at = static_cast<int>(DrawnRow(a.seed, b, s.prefix, head, j, sparse, strata));
    const int ordinal = r.by_tile(at);
    a.drawn[GuardRowBase(a, b, head) + j] =
        a.sparse_tiles[base + ordinal] * r.tile_tokens + at - ordinal * r.tile_tokens;
  }
  if (static_cast<int>(threadIdx.x) < r.heads_per_tile) {
    a.heads[b * p.q_heads + mask_head * r.heads_per_tile + threadIdx.x] =
        HeadDraw{static_cast<int>(sparse), static_cast<int>(strata)};
  }
}

__global__ void __launch_bounds__(kMarkThreads) ListedKernel(const __grid_constant__ GuardArgs a) {
  __shared__ uint32_t marks[kMarkKeys / 32];
  GridWait();
  GridRelease();
  if (GuardSkips(a)) return;
  const Problem& p = a.d.p;
  const int64_t of_head = blockIdx.x / a.most_rows;
  const int j = static_cast<int>(blockIdx.x - of_head * a.most_rows);
  const int b = static_cast<int>(of_head / p.q_heads), head = static_cast<int>(of_head % p.q_heads);
  if (j >= a.heads[of_head].strata) return;
  const DeviceSequence s = SequenceAt(a.d, b);
  const int row = a.drawn[GuardRowBase(a, b, head) + j], seen = GuardKeysSeen(a, s, row);
  const int segment = a.rules.by_tile(row) / a.segment_tiles;
  const int64_t tokens_before = QueryBegin(p, b), segment_tokens = a.segment_tokens;
  const int64_t list_row =
      int64_t{head / a.rules.heads_per_tile} * a.segment_rows + tokens_before / segment_tokens + b + segment;
  const int32_t* const list = a.key_lists + list_row * a.list_stride;
  const int count = ClampTo(list[0], a.max_keys);
  uint64_t* const to = a.listed + int64_t{blockIdx.x} * a.listed_words;
  for (int first = 0; first < seen; first += kMarkKeys) {
    for (int i = threadIdx.x; i < kMarkKeys / 32; i += kMarkThreads) marks[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kMarkThreads) {
      const int key = list[2 + i];
      if (key >= first && key < seen && key - first < kMarkKeys) {
        atomicOr(&marks[(key - first) / 32], 1u << ((key - first) % 32));
      }
    }
    __syncthreads();
    const int words = min(kMarkKeys / 64, (seen - first + 63) / 64);
    for (int i = threadIdx.x; i < words; i += kMarkThreads) {
      to[first / 64 + i] = static_cast<uint64_t>(marks[2 * i + 1]) << 32 | marks[2 * i];
    }
    __syncthreads();
  }
}

} // namespace

cudaError_t LaunchGuardDraw(const GuardArgs& args, cudaStream_t stream) {
  return LaunchOverlapped(DrawKernel, true, int64_t{args.d.p.batch} * args.mask_heads, kThreads, 0, stream, args);
}

cudaError_t LaunchGuardListed(const GuardArgs& args, cudaStream_t stream) {
  const int64_t rows = int64_t{args.d.p.batch} * args.d.p.q_heads * args.most_rows;
  return LaunchOverlapped(ListedKernel, true, rows, kMarkThreads, 0, stream, args);
}

} // namespace flashprefill::cuda
