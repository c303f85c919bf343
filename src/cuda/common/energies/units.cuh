// Units of the score kernels: how a work index maps to them, and what warps that work on a set of them share. A *unit*
// is one tile of one mask head (score.h); units that are worked on together are a *set*, and an item is a set or more.
#ifndef FLASHPREFILL_CUDA_COMMON_ENERGIES_UNITS_CUH_
#define FLASHPREFILL_CUDA_COMMON_ENERGIES_UNITS_CUH_

#include "cuda/common/energies/keep.cuh"
#include "cuda/common/energies/score.h"
#include "cuda/common/means.h"

namespace flashprefill::cuda {

constexpr int kScoreGroups = 4;        // of four warps, that make a product together, at most
constexpr int kScorePanelColumns = 64; // 128 bytes per row
constexpr int kScorePanelBytes = 128;  // of one row
constexpr int kScoreUnits = 32;        // of all groups, at most: 8 of each of four, or 16 of each of two

// The host's choices that both families of kernels make. A set belongs to one or more groups of warps, its *team*,
// which take turns at the steps.
struct UnitPlan {
  int units; // of a set, a power of two: fewer than fit where energies need the room
  int log2_units;
  int sets; // 1, 2 or 4, at most one per group
  int log2_team;
  int energy_stride, energy_bytes;             // of a unit; 4, or 2 where floats leave no room (__half)
  int slots;                                   // items per KV head, at most
  Divider by_item, by_kv, by_heads, by_chunks; // units per item, kv_heads, heads_per_tile, 16-byte pieces of a row of q

  void SetDividers(const Problem& p, const TileRules& rules) {
    log2_units = std::countr_zero(static_cast<unsigned>(units));
    slots = static_cast<int>(int64_t{rules.tile_rows} * rules.units_per_kv / (units * sets) + p.batch);
    by_item = Divider::Of(units * sets);
    by_chunks = Divider::Of(DivUp(p.head_dim, 8));
    by_kv = Divider::Of(p.kv_heads);
    by_heads = Divider::Of(rules.heads_per_tile);
  }
};

// One piece of work: consecutive units of one KV head of one sequence.
struct ScoreItem {
  DeviceSequence sequence;
  int kv;
  int first; // unit
  int units; // of the sequence and KV head
  int steps; // times 64 blocks that some unit scores
  bool end;  // no more work
};

struct ScoreUnit {
  int full;     // blocks [0, full) are seen by each of the unit's columns
  int row;      // of the mask, all heads together; -1 if there is none
  MaskRow bits; // scored: 0 if nothing is chosen by score
};

// What the warps of a group share.
struct UnitControl {
  ScoreUnit unit[kScoreUnits];              // group by group
  float base[kScoreUnits];                  // set by set: of each unit, the base of energies of 16 bits
  int kept[kScoreGroups][4];                // bits that each warp has set, where several share a unit
  alignas(16) int limit[kScoreGroups][128]; // of each column: it sees blocks [0, limit)
};

// The item of a number. Items of sequence b begin at (its first mask row * mask heads per KV head) / units per item +
// b, which leaves room for all of them without prefix sums, as Geometry::TileBase does for tiles. Higher numbers are
// earlier tiles, because the last tiles have the most blocks to score.
__device__ inline bool PlaceScoreItem(const ScoreArgs& a, const UnitPlan& plan, int id, ScoreItem& item) {
  const TileRules& r = a.rules;
  const int units_per_item = plan.units * plan.sets;
  const int round = plan.by_kv(id);
  item.kv = id - round * a.d.p.kv_heads;
  const int slot = plan.slots - 1 - round;
  auto base = [&](int b) { return plan.by_item(TileBaseOf(a.d, r, b) * r.units_per_kv) + b; };
  const int b = SequenceOfSlot(a.d.p.batch, slot, base);
  item.sequence = SequenceAt(a.d, b);
  item.units = item.sequence.Tiles(r) * r.units_per_kv;
  item.first = (slot - base(b)) * units_per_item;
  item.end = false;
  if (item.first < 0 || item.first >= item.units) return false;
  const int last_tile =
      min((min(item.first + units_per_item, item.units) - 1) / r.units_per_kv, FirstDenseTile(r, item.sequence) - 1);
  const bool scored = last_tile >= item.first / r.units_per_kv && !KeepsEverything(a.d.p, r, item.sequence);
  item.steps = scored ? (TileAt(a.d.p, r, item.sequence, last_tile).scored + kStepBlocks - 1) / kStepBlocks : 0;
  return true;
}

// The next item of this CTA from number `id` on, or the end. Each role walks the list by itself.
__device__ inline void NextScoreItem(const ScoreArgs& a, const UnitPlan& plan, int& id, ScoreItem& item) {
  bool placed = false;
  for (; !placed && id < plan.slots * a.d.p.kv_heads; id += gridDim.x) placed = PlaceScoreItem(a, plan, id, item);
  item.end = !placed;
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ENERGIES_UNITS_CUH_
