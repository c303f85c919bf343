// What a guard does to the mask for heads that keep too little: everything is kept; or the blocks that audited rows
// miss most are joined to their tiles, and what a selection with a larger budget keeps. A warp per row of the mask,
// which leaves where its head is not wanted.
#include "cuda/common/guard/args.h"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// The mask's row of a warp, and its tile; false if there is none, or its head is not wanted.
struct WantedRow {
  DeviceSequence sequence;
  int64_t row;
  int mask_head, tile;
};
__device__ bool PlaceWantedRow(const GuardArgs& a, WantedRow& at) {
  if (*a.any_wanted == 0) return false;
  const TileRules& r = a.rules;
  at.row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (at.row >= int64_t{a.mask_heads} * r.tile_rows) return false;
  at.mask_head = static_cast<int>(at.row / r.tile_rows);
  const int tile_row = static_cast<int>(at.row - int64_t{at.mask_head} * r.tile_rows);
  const int b = SequenceOfSlot(a.d.p.batch, tile_row, [&](int i) { return TileBaseOf(a.d, r, i); });
  if (!a.wanted[b * a.mask_heads + at.mask_head]) return false;
  at.sequence = SequenceAt(a.d, b);
  at.tile = tile_row - at.sequence.TileBase(r);
  return at.tile >= 0 && at.tile < at.sequence.Tiles(r);
}

__global__ void __launch_bounds__(kThreads) KeepAllKernel(const __grid_constant__ GuardArgs a) {
  WantedRow at;
  if (!PlaceWantedRow(a, at)) return;
  const int visible = TileAt(a.d.p, a.rules, at.sequence, at.tile).visible, lane = threadIdx.x % 32;
  for (int w = lane; w < a.words; w += 32) a.bits[at.row * a.words + w] = GuardVisible(~uint64_t{0}, w, visible);
  if (a.counts && lane == 0) a.counts[at.row] = visible;
}

// Keys of a list that lie in none of a tile's kept blocks, as blocks: ListedBlocks of core/key_list.h. A whole warp.
__device__ int ListedBlocksOf(const GuardArgs& a, const WantedRow& at, const int32_t* list, int seen) {
  const uint64_t* const bits = a.bits + at.row * a.words;
  int keys = 0;
  for (int i = threadIdx.x % 32; i < ClampTo(list[0], a.max_keys); i += 32) {
    const int key = list[2 + i];
    if (key < 0 || key >= seen) continue;
    const int block = a.rules.by_block(key);
    keys += !(bits[block >> 6] >> (block & 63) & 1);
  }
  return a.rules.by_block(__reduce_add_sync(~0u, keys) + a.rules.block_size / 2);
}

__global__ void __launch_bounds__(kThreads)
    AdoptKernel(const __grid_constant__ GuardArgs a, const uint64_t* more, const int32_t* lists) {
  WantedRow at;
  if (!PlaceWantedRow(a, at)) return;
  const DeviceTile tile = TileAt(a.d.p, a.rules, at.sequence, at.tile);
  uint64_t* const bits = a.bits + at.row * a.words;
  int kept = 0;
  for (int w = threadIdx.x % 32; w < a.words; w += 32) {
    const uint64_t word = bits[w] | more[at.row * a.words + w];
    bits[w] = word;
    kept += __popcll(GuardVisible(word, w, tile.visible));
  }
  kept = __reduce_add_sync(~0u, kept);
  __syncwarp();
  if (lists) {
    const int64_t first = QueryBegin(a.d.p, at.sequence.index) / a.segment_tokens + at.sequence.index;
    const int64_t row = int64_t{at.mask_head} * a.segment_rows + first + at.tile / a.segment_tiles;
    // By the other mask's list: this one's is copied only after.
    kept += ListedBlocksOf(a, at, lists + row * a.list_stride, at.sequence.prefix + tile.end);
  }
  if (a.counts && threadIdx.x % 32 == 0) a.counts[at.row] = kept;
}

// A CTA per list.
__global__ void __launch_bounds__(kThreads)
    AdoptListsKernel(const __grid_constant__ GuardArgs a, const int32_t* more, int32_t* lists) {
  if (*a.any_wanted == 0) return;
  const int mask_head = static_cast<int>(blockIdx.x) / a.segment_rows;
  const int row = static_cast<int>(blockIdx.x) - mask_head * a.segment_rows;
  const int b = SequenceOfSlot(a.d.p.batch, row,
                               [&](int i) { return static_cast<int>(QueryBegin(a.d.p, i) / a.segment_tokens) + i; });
  if (!a.wanted[b * a.mask_heads + mask_head]) return;
  const int64_t from = int64_t{blockIdx.x} * a.list_stride;
  const int count = 2 + ClampTo(more[from], a.max_keys);
  for (int i = threadIdx.x; i < count; i += kThreads) lists[from + i] = more[from + i];
}

// A thread per audited row.
__global__ void __launch_bounds__(kThreads) JoinMissedKernel(const __grid_constant__ GuardArgs a) {
  if (*a.any_wanted == 0) return;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x, of_head = thread / a.most_rows;
  if (of_head >= int64_t{a.d.p.batch} * a.d.p.q_heads) return;
  const int b = static_cast<int>(of_head / a.d.p.q_heads), head = static_cast<int>(of_head % a.d.p.q_heads);
  const int j = static_cast<int>(thread - of_head * a.most_rows);
  if (j >= a.heads[of_head].strata || !a.wanted[b * a.mask_heads + head / a.rules.heads_per_tile]) return;
  const int block = a.missed[thread];
  if (block < 0) return;
  const DeviceSequence s = SequenceAt(a.d, b);
  const int64_t row = GuardMaskRow(a, s, head, a.rules.by_tile(a.drawn[thread]));
  auto* const word = reinterpret_cast<unsigned long long*>(a.bits + row * a.words + block / 64);
  atomicOr(word, 1ull << (block % 64));
}

template <typename... Params>
cudaError_t Launch(void (*kernel)(Params...), int64_t grid, cudaStream_t stream, const Params&... params) {
  if (grid == 0) return cudaSuccess;
  kernel<<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(params...);
  return cudaGetLastError();
}

int64_t MaskRows(const GuardArgs& args) { return int64_t{args.mask_heads} * args.rules.tile_rows; }

} // namespace

cudaError_t LaunchGuardKeepAll(const GuardArgs& args, cudaStream_t stream) {
  return Launch(KeepAllKernel, DivUp<int64_t>(MaskRows(args), kWarps), stream, args);
}

cudaError_t LaunchGuardJoinMissed(const GuardArgs& args, cudaStream_t stream) {
  const int64_t rows = int64_t{args.d.p.batch} * args.d.p.q_heads * args.most_rows;
  return Launch(JoinMissedKernel, DivUp<int64_t>(rows, kThreads), stream, args);
}

cudaError_t LaunchGuardAdopt(const GuardArgs& args, const uint64_t* more_bits, const int32_t* more_lists,
                             cudaStream_t stream) {
  if (cudaError_t e =
          Launch(AdoptKernel, DivUp<int64_t>(MaskRows(args), kWarps), stream, args, more_bits, more_lists)) {
    return e;
  }
  if (!more_lists) return cudaSuccess;
  return Launch(AdoptListsKernel, int64_t{args.mask_heads} * args.segment_rows, stream, args, more_lists,
                args.key_lists);
}

} // namespace flashprefill::cuda
