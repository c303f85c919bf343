// Of the score kernel: what the host chooses, shared memory, the words that its producer and its math warpgroups speak
// to each other, where a number of work leads, and the producer.
#ifndef FLASHPREFILL_CUDA_SM90_SCORE_PLAN_CUH_
#define FLASHPREFILL_CUDA_SM90_SCORE_PLAN_CUH_

#include "cuda/attend.h"
#include "cuda/common/ptx.cuh"
#include "cuda/sm90/score.h"

namespace flashprefill::cuda {

constexpr int kScoreGroups = 2; // math warpgroups
constexpr int kScoreThreads =
    128 * kScoreGroups + 128;          // the producer is a warpgroup, so that registers can change hands
constexpr int kScorePanelColumns = 64; // 128 bytes a row
constexpr int kScorePanelBytes = 128;  // of one row
constexpr int kScoreStages = 8;
constexpr int kScoreUnits = 8; // of a warpgroup

// What the host has chosen beside the arguments.
struct ScorePlan {
  int panels;   // of 64 columns a row of q or k
  int q_panels; // twice as many with squares
  int units;    // of a warpgroup in use, a power of two: fewer than fit where energies need the room
  int log2_units;
  int groups; // warpgroups in use
  int q_stages, k_stages;
  int energy_stride;                // floats a unit
  int slots;                        // items a KV head, at most
  Divider by_item, by_kv, by_heads; // units an item, kv_heads, heads_a_tile
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
  int scored; // blocks with an energy; 0 if nothing is chosen by score
  int full;   // blocks [0, full) are seen by each of the unit's columns
  int tile;
  bool dense;
};

struct ScoreControl {
  uint64_t q_full[2], q_empty[2], k_full[kScoreStages], k_empty[kScoreStages];
  ScoreItem item[2];
  ScoreUnit unit[kScoreGroups][kScoreUnits];
  int kept[kScoreGroups][4];                // bits that each warp has set, where several share a unit
  alignas(16) int limit[kScoreGroups][128]; // of each column: it sees blocks [0, limit)
};

struct ScoreLayout { // of dynamic shared memory, after the alignment to 1024
  int q_group, q_stage, k_stage, k, energies, energies_group, control, total;
};

__host__ __device__ inline ScoreLayout ScoreLayoutOf(const ScorePlan& plan, int columns) {
  ScoreLayout l;
  l.q_group = plan.q_panels * columns * kScorePanelBytes;
  l.q_stage = l.q_group * plan.groups;
  l.k_stage = plan.panels * kStepBlocks * kScorePanelBytes;
  l.k = l.q_stage * plan.q_stages;
  l.energies = l.k + l.k_stage * plan.k_stages;
  l.energies_group = plan.units * plan.energy_stride * 4;
  l.control = (l.energies + l.energies_group * plan.groups + 15) / 16 * 16;
  l.total = l.control + static_cast<int>(sizeof(ScoreControl));
  return l;
}

// Where a side of a ring of stages stands: the next stage, and how often (mod 2) it has been round.
struct ScoreRing {
  int stage = 0;
  uint32_t round = 0;

  __device__ void Advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      round ^= 1;
    }
  }
};

// Where an item's number leads. Items of a sequence begin at (its first mask row * mask heads a KV head) / units an
// item
// + b, which leaves room for all of them without prefix sums, as fp_tile_base does for tiles. Higher numbers are
// earlier tiles, because the last tiles have the most blocks to score.
__device__ inline bool PlaceScoreItem(const ScoreArgs& a, const ScorePlan& plan, int id, ScoreItem& item) {
  const TileRules& r = a.rules;
  const int units_an_item = plan.units * plan.groups;
  const int round = plan.by_kv(id);
  item.kv = id - round * a.d.p.kv_heads;
  const int slot = plan.slots - 1 - round;
  auto base = [&](int b) { return plan.by_item(TileBaseOf(a.d, r, b) * r.units_a_kv) + b; };
  const int b = SequenceOfSlot(a.d.p.batch, slot, base);
  item.sequence = SequenceAt(a.d, b);
  item.units = item.sequence.Tiles(r) * r.units_a_kv;
  item.first = (slot - base(b)) * units_an_item;
  item.end = false;
  if (item.first < 0 || item.first >= item.units) return false;
  const int last_tile =
      min((min(item.first + units_an_item, item.units) - 1) / r.units_a_kv, FirstDenseTile(r, item.sequence) - 1);
  const bool scored = last_tile >= item.first / r.units_a_kv && !AllForcedAt(a.d.p, r, item.sequence);
  item.steps = scored ? (TileAt(a.d.p, r, item.sequence, last_tile).scored + kStepBlocks - 1) / kStepBlocks : 0;
  return true;
}

// The one thread that starts copies.
__device__ inline void ProduceScores(const ScoreArgs& a, const ScorePlan& plan, const ScoreLayout& layout, char* shared,
                                     ScoreControl& c, int columns) {
  const TileRules& r = a.rules;
  const int planes = a.sketch ? 2 + a.outliers : 1;
  ScoreRing q_ring, k_ring;
  auto hand_over = [&](const ScoreItem& item) {
    const int stage = q_ring.stage;
    uint64_t* full = &c.q_full[stage];
    BarrierWait(&c.q_empty[stage], q_ring.round ^ 1);
    c.item[stage] = item;
    q_ring.Advance(plan.q_stages);
    if (item.end || item.steps == 0) {
      BarrierArrive(full);
      return;
    }
    const int tile_base = item.sequence.TileBase(r);
    char* const q = shared + stage * layout.q_stage;
    const int box_rows = a.rows_in_q ? r.tile_tokens * r.heads_a_tile : columns;
    int groups = 0;
    while (groups < plan.groups && item.first + groups * plan.units < item.units) ++groups;
    BarrierArriveExpect(full, groups * plan.q_panels * box_rows * kScorePanelBytes);
    for (int g = 0; g < groups; ++g) {
      const int unit = item.first + g * plan.units;
      const int64_t first_unit = (int64_t{item.kv} * r.tile_rows + tile_base) * r.units_a_kv + unit;
      for (int panel = 0; panel < plan.q_panels; ++panel) {
        char* const to = q + g * layout.q_group + panel * columns * kScorePanelBytes;
        if (a.rows_in_q) {
          const int tile = r.by_units(unit), token = tile * r.tile_tokens;
          const int head = (item.kv * r.units_a_kv + unit - tile * r.units_a_kv) * r.heads_a_tile;
          BulkLoad(to, &a.q_map, full, panel * kScorePanelColumns, head,
                   a.d.p.cu_seqlens_q ? item.sequence.q_begin + token : token,
                   a.d.p.cu_seqlens_q ? 0 : item.sequence.index);
        } else {
          const bool squares = panel >= plan.panels;
          BulkLoad(to, &a.q_map, full, (squares ? panel - plan.panels : panel) * kScorePanelColumns,
                   static_cast<int>((first_unit + (squares ? a.unit_count : 0)) * a.unit_rows), 0, 0);
        }
      }
    }
    const bool packed = a.d.p.cu_seqlens_k && !a.d.p.block_table;
    const int64_t base = item.kv * a.mean_rows +
                         MeanBase(packed, item.sequence.index, item.sequence.k_begin, a.d.p.max_seqlen_k, r.block_size);
    for (int step = 0; step < item.steps; ++step) {
      for (int plane = 0; plane < planes; ++plane) {
        uint64_t* const full_k = &c.k_full[k_ring.stage];
        BarrierWait(&c.k_empty[k_ring.stage], k_ring.round ^ 1);
        BarrierArriveExpect(full_k, layout.k_stage);
        const int64_t row = base + plane * (a.mean_rows * a.d.p.kv_heads) + step * kStepBlocks;
        for (int panel = 0; panel < plan.panels; ++panel) {
          BulkLoad(shared + layout.k + k_ring.stage * layout.k_stage + panel * kStepBlocks * kScorePanelBytes, &a.k_map,
                   full_k, panel * kScorePanelColumns, static_cast<int>(row), 0, 0);
        }
        k_ring.Advance(plan.k_stages);
      }
    }
  };
  for (int id = blockIdx.x; id < plan.slots * a.d.p.kv_heads; id += gridDim.x) {
    ScoreItem item;
    if (PlaceScoreItem(a, plan, id, item)) hand_over(item);
  }
  ScoreItem end{};
  end.end = true;
  hand_over(end);
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_SCORE_PLAN_CUH_
