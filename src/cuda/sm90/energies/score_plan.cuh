// Plan of the score kernel: the host's choices, shared memory, the structs that warps exchange in it, and how a work
// index maps to units.
#ifndef FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_PLAN_CUH_
#define FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_PLAN_CUH_

#include "cuda/common/means.h"
#include "cuda/common/ring.cuh"
#include "cuda/sm90/energies/keep.cuh"
#include "cuda/sm90/energies/score.h"

namespace flashprefill::cuda {

constexpr int kScoreGroups = 4;        // math warpgroups at most
constexpr int kScorePanelColumns = 64; // 128 bytes per row
constexpr int kScorePanelBytes = 128;  // of one row
constexpr int kScoreStages = 4;        // of keys at most
constexpr int kScoreBuffers = 8;       // of queries at most
constexpr int kScoreUnits = 8;         // of a set

// Warpgroups of a kernel, and the registers that a thread of each has: math, one that starts copies, and those that
// pool query rows, where rows are made here (64 columns). FlashPrefill's math is little compared to its loads, so loads
// get most threads, and math the registers for one product at a time. Sketch's math is more, and holds two products.
// With 128 columns there are registers for one, and four warpgroups to take turns. Together they have what the launch
// gave, and only math gets more than that.
template <int COLUMNS, bool SKETCH>
struct ScoreShape {
  static constexpr bool kTwoProducts = COLUMNS == 64 && SKETCH;
  static constexpr bool kHalfEnergies = kTwoProducts; // if need be; not where a team would have to agree on their base
  static constexpr int kMathGroups = COLUMNS == 64 ? 2 : 4;
  static constexpr int kPoolGroups = COLUMNS == 128 ? 0 : SKETCH ? 3 : 4, kPoolWarps = 4 * kPoolGroups;
  static constexpr int kGroups = kMathGroups + 1 + kPoolGroups, kThreads = 128 * kGroups;
  static constexpr int kAtLaunch = 65536 / kThreads / 8 * 8;
  static constexpr int kCopyRegisters = 24, kPoolRegisters = SKETCH ? 64 : 72;
  static constexpr int kMathRegisters =
      (kAtLaunch * kGroups - kCopyRegisters - kPoolGroups * kPoolRegisters) / kMathGroups / 8 * 8;
};

// The host's choices besides the arguments. Units that are worked on together are a *set*; a set belongs to one or
// more math warpgroups, its *team*, which take turns at the steps. With 64 columns a team is one warpgroup.
struct ScorePlan {
  int panels;   // of 64 columns per row of q or k
  int q_panels; // twice as many with squares
  int units;    // of a set, a power of two: fewer than fit where energies need the room
  int log2_units;
  int sets; // 1, 2 or 4, at most one a math warpgroup
  int log2_team;
  int q_buffers; // each for a set; sets take them in turn
  int k_stages;
  int energy_stride, energy_bytes;             // of a unit; 4, or 2 where floats leave no room (__half)
  int bin_warps;                               // that may look for a mass
  int slots;                                   // items per KV head, at most
  Divider by_item, by_kv, by_heads, by_chunks; // units per item, kv_heads, heads_per_tile, 16-byte pieces of a row of q
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

struct ScoreControl {
  uint64_t q_full[kScoreBuffers], q_empty[kScoreBuffers], placed[kScoreBuffers];
  uint64_t k_full[kScoreStages], k_empty[kScoreStages];
  ScoreItem item[kScoreBuffers];
  ScoreUnit unit[kScoreGroups][kScoreUnits];
  float base[kScoreGroups][kScoreUnits];    // of each unit: the base of energies of 16 bits
  int kept[kScoreGroups][4];                // bits that each warp has set, where several share a unit
  alignas(16) int limit[kScoreGroups][128]; // of each column: it sees blocks [0, limit)
};

struct ScoreLayout { // of dynamic shared memory, after the alignment to 1024
  int q_buffer, k_stage, k, energies, energies_set, bins, control, total;
};

__host__ __device__ inline ScoreLayout ScoreLayoutOf(const ScorePlan& plan, int columns) {
  ScoreLayout l;
  l.q_buffer = plan.q_panels * columns * kScorePanelBytes;
  l.k_stage = plan.panels * kStepBlocks * kScorePanelBytes;
  l.k = l.q_buffer * plan.q_buffers;
  l.energies = l.k + l.k_stage * plan.k_stages;
  l.energies_set = plan.units * plan.energy_stride * plan.energy_bytes;
  l.bins = (l.energies + l.energies_set * plan.sets + 15) / 16 * 16;
  l.control = l.bins + plan.bin_warps * kThresholdBins * 4;
  l.total = l.control + static_cast<int>(sizeof(ScoreControl));
  return l;
}

// The item of a number. Items of a sequence begin at (its first mask row * mask heads per KV head) / units an
// item
// + b, which leaves room for all of them without prefix sums, as Geometry::TileBase does for tiles. Higher numbers are
// earlier tiles, because the last tiles have the most blocks to score.
__device__ inline bool PlaceScoreItem(const ScoreArgs& a, const ScorePlan& plan, int id, ScoreItem& item) {
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
__device__ inline void NextScoreItem(const ScoreArgs& a, const ScorePlan& plan, int& id, ScoreItem& item) {
  bool placed = false;
  for (; !placed && id < plan.slots * a.d.p.kv_heads; id += gridDim.x) placed = PlaceScoreItem(a, plan, id, item);
  item.end = !placed;
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_PLAN_CUH_
