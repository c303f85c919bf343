// Parts of the strided score kernel: the host's choices, shared memory, the list of strips, and the producer warp.
#ifndef FLASHPREFILL_CUDA_SM90_STRIDED_SCORE_PLAN_CUH_
#define FLASHPREFILL_CUDA_SM90_STRIDED_SCORE_PLAN_CUH_

#include <cuda.h>

#include "cuda/common/ptx.cuh"
#include "cuda/common/ring.cuh"
#include "cuda/common/strided/strips.cuh"

namespace flashprefill::cuda {

constexpr int kStridedGroups = 2; // math warpgroups, of 64 rows each
constexpr int kStridedThreads = 128 * kStridedGroups + 128;
constexpr int kStridedMostStages = 4;
constexpr int kStridedItems = 2; // work that the producer is ahead

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

// Arguments, with tensor maps.
struct StridedScoreParams : StridedScoreArgs {
  CUtensorMap k_map; // of k_cells, boxes of 64 columns and kKeyTileCells rows
  CUtensorMap q_map; // of q_rows, boxes of 64 columns and box_units units
  // Of q and k themselves: column, cell, head, token of the first cell. Boxes are one tile's cells of box_units heads,
  // and a key tile's cells.
  CUtensorMap q_direct_map, k_direct_map;
};

struct StridedScorePlan : StripPlan {
  int stages;
  Divider by_columns; // head_dim
};

// Starts the bulk copies of all steps of one piece of work: lanes share the boxes of rows, lane 31 brings the cells.
__device__ __forceinline__ void LoadPiece(const StridedScoreParams& args, const StridedScorePlan& plan, char* shared,
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

// The producer warp. It takes its pieces of work, and announces and loads them.
__device__ inline void ProduceStrided(const StridedScoreParams& args, const StridedScorePlan& plan, char* shared,
                                      StridedControl& c) {
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

  ForPieces(
      args.common, plan, c.strips, true, [] { __syncwarp(); },
      [&](const StridedStrip& strip, int key_tile) {
        hand_over(strip, key_tile, false);
        LoadPiece(args, plan, shared, c, strip, key_tile, ring);
      });
  hand_over(StridedStrip{}, 0, true);
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_STRIDED_SCORE_PLAN_CUH_
