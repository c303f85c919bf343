// Parts of the strided score kernel: the host's choices, shared memory, the list of strips, and the producer warp.
#ifndef FLASHPREFILL_CUDA_SM90_STRIDED_SCORE_PLAN_CUH_
#define FLASHPREFILL_CUDA_SM90_STRIDED_SCORE_PLAN_CUH_

#include "cuda/common/ptx.cuh"
#include "cuda/common/ring.cuh"
#include "cuda/sm90/strided/cells.cuh"

namespace flashprefill::cuda {

constexpr int kStridedGroups = 2; // math warpgroups, of 64 rows each
constexpr int kStridedThreads = 128 * kStridedGroups + 128;
constexpr int kStridedRowBytes = 128;
constexpr int kStridedRowsStage = kStripRows * kStridedRowBytes;
constexpr int kStridedStage = kStridedRowsStage + kKeyTileCells * kStridedRowBytes;
constexpr int kStridedMostStages = 4;
constexpr int kStridedItems = 2; // work that the producer is ahead
constexpr int kStridedWarpRows = 16;
constexpr int kStridedGroupStrips = 32; // a lane of the producer warp each

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

struct StridedItem {
  StridedStrip strip;
  int key_tile;
  bool end; // no more work
};

struct StridedControl {
  uint64_t full[kStridedMostStages], empty[kStridedMostStages], item_full[kStridedItems], item_empty[kStridedItems];
  StridedItem item[kStridedItems];
  StridedStrip strips[kStridedGroupStrips];
};

struct StridedScorePlan {
  int steps, stages;
  int slots;          // strips of a KV head, at most
  int staging_row;    // bytes per row
  bool whole_groups;  // a block is a multiple of 8 cells
  Divider by_groups;  // groups of strips per KV head
  Divider by_columns; // head_dim
};

__host__ __device__ inline int StridedStagingBytes(const StridedScorePlan& plan) {
  return 4 * kStridedGroups * kStridedWarpRows * plan.staging_row;
}

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
  strip.key_tiles = KeyTilesSeen(g, strip.sequence, TileAt(a.d.p, r, strip.sequence, last));
  return strip;
}

// Starts the bulk copies of all steps of one piece of work: lanes share the boxes of rows, lane 31 brings the cells.
__device__ __forceinline__ void LoadPiece(const StridedScoreArgs& args, const StridedScorePlan& plan, char* shared,
                                          StridedControl& c, const StridedStrip& strip, int key_tile,
                                          RingPosition& ring) {
  const StridedArgs& a = args.common;
  const StridedShape& g = a.shape;
  const TileRules& r = a.rules;
  const Problem& p = a.d.p;
  const int lane = threadIdx.x % 32;
  const DeviceSequence& s = strip.sequence;
  const bool packed = PackedKeys(p);
  const int64_t first_key = (int64_t{key_tile} * g.key_tile_cells) << g.log2_stride;
  const bool whole = g.direct_k && first_key + (kKeyTileCells << g.log2_stride) <= s.k_len;
  const int64_t base =
      g.direct_k ? s.index * kKeyTileCells : MeanBase(p, s, g.stride) + int64_t{key_tile} * g.key_tile_cells;
  const int cell = static_cast<int>(whole ? (packed ? s.k_begin : s.index * p.max_seqlen_k) + first_key
                                          : strip.kv * g.cell_rows + base);
  const int boxes = (strip.units + g.box_units - 1) / g.box_units;
  const int box_bytes = g.box_units * g.rows_per_unit * kStridedRowBytes;
  // Where the boxes of this lane come from: a tile in q itself, or rows of the copy. 32 lanes take up to 128 boxes.
  constexpr int kBoxes = 4;
  int row[kBoxes], head[kBoxes];
  bool direct[kBoxes];
#pragma unroll
  for (int k = 0; k < kBoxes; ++k) {
    const int box = lane + 32 * k;
    if (box >= boxes) break;
    const int unit = strip.unit + box * g.box_units, in_range = r.by_units(unit);
    const int in_tile = unit - in_range * r.units_per_kv;
    const DeviceTile tile = TileAt(p, r, s, strip.first_tile + in_range);
    direct[k] = g.direct_q && tile.end - tile.begin == r.tile_tokens;
    head[k] = strip.kv * r.units_per_kv + in_tile;
    const int q_tile = g.direct_q ? s.index : strip.local_tile + in_range;
    row[k] = direct[k]
                 ? s.q_begin + tile.begin + g.stride - 1
                 : static_cast<int>(((strip.kv * g.q_tiles + q_tile) * r.units_per_kv + in_tile) * g.rows_per_unit);
  }
  for (int step = 0; step < plan.steps; ++step) {
    uint64_t* const full = &c.full[ring.stage];
    char* const stage = shared + ring.stage * kStridedStage;
    BarrierWait(&c.empty[ring.stage], ring.parity ^ 1);
    if (lane == 0) BarrierArriveExpect(full, boxes * box_bytes + kKeyTileCells * kStridedRowBytes);
    __syncwarp();
    const int column = step * kStridedPanel;
    const int t = plan.by_columns(column);
#pragma unroll
    for (int k = 0; k < kBoxes; ++k) {
      const int box = lane + 32 * k;
      if (box >= boxes) break;
      char* const to = stage + box * box_bytes;
      if (direct[k]) {
        BulkLoad(to, &args.q_direct_map, full, column - t * p.head_dim, 0, head[k], row[k] - t);
      } else {
        BulkLoad(to, &args.q_map, full, column, row[k], 0, 0);
      }
    }
    if (lane == 31) {
      char* const to = stage + kStridedRowsStage;
      if (whole) {
        BulkLoad(to, &args.k_direct_map, full, column - t * p.head_dim, 0, strip.kv, cell + t);
      } else {
        BulkLoad(to, &args.k_map, full, column, cell, 0, 0);
      }
    }
    ring.Advance(plan.stages);
  }
  __syncwarp();
}

// The producer warp. It numbers the pieces of work as every other producer does, takes its own, and announces and loads
// them.
__device__ inline void ProduceStrided(const StridedScoreArgs& args, const StridedScorePlan& plan, char* shared,
                                      StridedControl& c) {
  const StridedArgs& a = args.common;
  const Problem& p = a.d.p;
  const int lane = threadIdx.x % 32;
  RingPosition ring, items;

  auto hand_over = [&](const StridedStrip& strip, int key_tile, bool end) {
    BarrierWait(&c.item_empty[items.stage], items.parity ^ 1);
    if (lane == 0) {
      c.item[items.stage] = StridedItem{strip, key_tile, end};
      BarrierArrive(&c.item_full[items.stage]);
    }
    items.Advance(kStridedItems);
    __syncwarp();
  };

  const int groups = (plan.slots + kStridedGroupStrips - 1) / kStridedGroupStrips;
  int mine = blockIdx.x; // the next piece of this CTA
  int count = 0;         // pieces of the groups and key tiles so far
  for (int group = 0; group < groups * p.kv_heads; ++group) {
    const int kv = plan.by_groups(group);
    const int slot = (group - kv * groups) * kStridedGroupStrips + lane;
    StridedStrip strip{};
    if (slot < plan.slots) strip = StridedStripAt(a, kv, slot);
    __syncwarp();
    c.strips[lane] = strip;
    __syncwarp();
    const int most = __reduce_max_sync(~0u, strip.key_tiles);
    for (int key_tile = 0; key_tile < most; ++key_tile) {
      const uint32_t who = __ballot_sync(~0u, strip.key_tiles > key_tile);
      const int pieces = __popc(who);
      for (; mine < count + pieces; mine += gridDim.x) {
        const StridedStrip& one = c.strips[__fns(who, 0, mine - count + 1)];
        hand_over(one, key_tile, false);
        LoadPiece(args, plan, shared, c, one, key_tile, ring);
      }
      count += pieces;
    }
  }
  hand_over(StridedStrip{}, 0, true);
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_STRIDED_SCORE_PLAN_CUH_
