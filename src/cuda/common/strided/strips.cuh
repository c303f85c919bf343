// Strips of rows, and the pieces of work of the strided score kernels: a strip against a key tile. They are numbered by
// every CTA for itself, in groups of 32 strips of one KV head, key tile after key tile, and CTA c takes the numbers c,
// c + CTAs, ... So all CTAs get the same number of equal pieces whatever the lengths are, no counter is in memory, and
// neighbours in time share strips and cells in L2.
#ifndef FLASHPREFILL_CUDA_COMMON_STRIDED_STRIPS_CUH_
#define FLASHPREFILL_CUDA_COMMON_STRIDED_STRIPS_CUH_

#include "cuda/common/strided/cells.cuh"

namespace flashprefill::cuda {

constexpr int kStridedGroupStrips = 32; // a lane each
constexpr int kStridedRowBytes = 128;   // of a panel
constexpr int kStridedRowsStage = kStripRows * kStridedRowBytes;
constexpr int kStridedStage = kStridedRowsStage + kKeyTileCells * kStridedRowBytes;
constexpr int kStridedWarps = 8; // that multiply
constexpr int kStridedWarpRows = 16;

// One strip. key_tiles is 0 where nothing is to be scored.
struct StridedStrip {
  DeviceSequence sequence;
  int kv;
  int first_tile; // of the sequence, in the chunk
  int local_tile; // that tile in the chunk
  int unit;       // the strip's first, counted from that tile
  int units;
  int key_tiles;
};

// The host's choices that both families of kernels make.
struct StripPlan {
  int steps;         // of 64 columns
  int slots;         // strips of a KV head, at most
  int staging_row;   // bytes per row of a warp's sums on their way out
  bool whole_groups; // a block is a multiple of 8 cells
  Divider by_groups; // groups of strips per KV head

  static StripPlan Of(const StridedArgs& a) {
    const StridedShape& g = a.shape;
    StripPlan plan{};
    plan.steps = DivUp(g.columns, kStridedPanel);
    plan.whole_groups = g.cells_per_block % 8 == 0;
    // 16 bytes more than the row: then eight rows begin on different banks.
    plan.staging_row = (plan.whole_groups ? g.block_pitch : kKeyTileCells) * 2 + 16;
    plan.slots = static_cast<int>((int64_t{a.tiles} * a.rules.units_per_kv) / g.stride + a.d.p.batch);
    plan.by_groups = Divider::Of(DivUp(plan.slots, kStridedGroupStrips));
    return plan;
  }
  int StagingBytes() const { return kStridedWarps * kStridedWarpRows * staging_row; }
};

// Strips of a sequence begin at (its first unit in the chunk) / units a strip + b, which leaves room for all of them
// without prefix sums.
__device__ inline StridedStrip StridedStripAt(const StridedArgs& a, int kv, int slot) {
  const TileRules& r = a.rules;
  const StridedShape& g = a.shape;
  auto base = [&](int b) {
    const int tile = min(max(TileBaseOf(a.d, r, b) - a.first_tile, 0), a.tiles);
    return ((tile * r.units_per_kv) >> g.log2_stride) + b;
  };
  const int b = SequenceOfSlot(a.d.p.batch, slot, base);
  StridedStrip strip;
  strip.sequence = SequenceAt(a.d, b);
  const StridedRange range = RangeOf(a, strip.sequence);
  strip.kv = kv;
  strip.first_tile = range.first_tile;
  strip.local_tile = range.local_tile;
  strip.unit = (slot - base(b)) << g.log2_stride;
  strip.units = min(g.stride, range.units - strip.unit);
  strip.key_tiles = 0;
  if (strip.unit < 0 || strip.units <= 0 || KeepsEverything(a.d.p, r, strip.sequence)) return strip;
  const int last =
      min(range.first_tile + r.by_units(strip.unit + strip.units - 1), FirstDenseTile(r, strip.sequence) - 1);
  if (last < range.first_tile + r.by_units(strip.unit)) return strip;
  strip.key_tiles = KeyTilesSeen(a, strip.sequence, TileAt(a.d.p, r, strip.sequence, last));
  return strip;
}

// body(strip, key_tile) for this CTA's pieces, by one warp or by all, which do the same: `mine` says which of them
// writes `strips`, in shared memory, and sync() is their barrier.
template <typename Sync, typename Body>
__device__ __forceinline__ void ForPieces(const StridedArgs& a, const StripPlan& plan, StridedStrip* strips, bool mine,
                                          Sync&& sync, Body&& body) {
  const int lane = threadIdx.x % 32;
  const int groups = (plan.slots + kStridedGroupStrips - 1) / kStridedGroupStrips;
  int number = blockIdx.x; // of the next piece of this CTA
  int count = 0;           // pieces of the groups and key tiles so far
  for (int group = 0; group < groups * a.d.p.kv_heads; ++group) {
    const int kv = plan.by_groups(group);
    const int slot = (group - kv * groups) * kStridedGroupStrips + lane;
    StridedStrip strip{};
    if (slot < plan.slots) strip = StridedStripAt(a, kv, slot);
    sync();
    if (mine) strips[lane] = strip;
    sync();
    const int most = __reduce_max_sync(~0u, strip.key_tiles);
    for (int key_tile = 0; key_tile < most; ++key_tile) {
      const uint32_t who = __ballot_sync(~0u, strip.key_tiles > key_tile);
      const int pieces = __popc(who);
      for (; number < count + pieces; number += gridDim.x) {
        body(strips[__fns(who, 0, number - count + 1)], key_tile);
      }
      count += pieces;
    }
  }
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_STRIDED_STRIPS_CUH_
