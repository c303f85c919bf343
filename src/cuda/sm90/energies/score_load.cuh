// Loads of the score kernel. One thread streams key data. Rows of queries come as they are, by
// a second thread, or are made here: warps read the raw rows, add them up and write the means as products want them, so
// that the memory's work and the arithmetic of the item before run side by side.
#ifndef FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_LOAD_CUH_
#define FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_LOAD_CUH_

#include "cuda/common/energies/unit_rows.cuh"
#include "cuda/sm90/energies/score_plan.cuh"

namespace flashprefill::cuda {

// One thread: key data of all steps of all items, through the ring.
__device__ inline void ProduceKeys(const ScoreParams& a, const ScorePlan& plan, const ScoreLayout& layout, char* shared,
                                   ScoreControl& c) {
  const int planes = a.sketch ? 2 + a.outliers : 1;
  RingPosition ring;
  ScoreItem item;
  for (int id = blockIdx.x;;) {
    NextScoreItem(a, plan, id, item);
    if (item.end) return;
    const int64_t base = item.kv * a.mean_rows + MeanBase(a.d.p, item.sequence, a.rules.block_size);
    for (int step = 0; step < item.steps; ++step) {
      for (int plane = 0; plane < planes; ++plane) {
        uint64_t* const full = &c.k_full[ring.stage];
        BarrierWait(&c.k_empty[ring.stage], ring.parity ^ 1);
        BarrierArriveExpect(full, layout.k_stage);
        const int64_t row = base + plane * (a.mean_rows * a.d.p.kv_heads) + step * kStepBlocks;
        for (int panel = 0; panel < plan.panels; ++panel) {
          BulkLoad(shared + layout.k + ring.stage * layout.k_stage + panel * kStepBlocks * kScorePanelBytes, &a.k_map,
                   full, panel * kScorePanelColumns, static_cast<int>(row), 0, 0);
        }
        ring.Advance(plan.k_stages);
      }
    }
  }
}

// One thread: hands items over, with the rows of queries that lie in memory as products want them, in q itself or where
// the pooling pass wrote them. POOLS: to the warps that make the rows.
template <bool POOLS>
__device__ void ProduceRows(const ScoreParams& a, const ScorePlan& plan, const ScoreLayout& layout, char* shared,
                            ScoreControl& c, int columns) {
  const TileRules& r = a.rules;
  RingPosition ring;
  ScoreItem item;
  int id = blockIdx.x;
  do {
    NextScoreItem(a, plan, id, item);
    for (int set = 0; set < plan.sets; ++set, ring.Advance(plan.q_buffers)) {
      uint64_t* const full = POOLS ? &c.placed[ring.stage] : &c.q_full[ring.stage];
      BarrierWait(&c.q_empty[ring.stage], ring.parity ^ 1);
      c.item[ring.stage] = item;
      const int unit = item.first + set * plan.units;
      if (POOLS || item.end || item.steps == 0 || unit >= item.units) {
        BarrierArrive(full);
        continue;
      }
      const int box_rows = a.rows_in_q ? r.tile_tokens * r.heads_per_tile : columns;
      BarrierArriveExpect(full, plan.q_panels * box_rows * kScorePanelBytes);
      char* const to = shared + ring.stage * layout.q_buffer;
      const int tile = r.by_units(unit);
      const int64_t in_scratch = (int64_t{item.kv} * r.tile_rows + item.sequence.TileBase(r)) * r.units_per_kv + unit;
      for (int panel = 0; panel < plan.q_panels; ++panel) {
        char* const panel_to = to + panel * columns * kScorePanelBytes;
        if (a.rows_in_q) {
          const int token = tile * r.tile_tokens;
          const int head = (item.kv * r.units_per_kv + unit - tile * r.units_per_kv) * r.heads_per_tile;
          BulkLoad(panel_to, &a.q_map, full, panel * kScorePanelColumns, head,
                   a.d.p.cu_seqlens_q ? item.sequence.q_begin + token : token,
                   a.d.p.cu_seqlens_q ? 0 : item.sequence.index);
        } else {
          const bool squares = panel >= plan.panels;
          BulkLoad(panel_to, &a.q_map, full, (squares ? panel - plan.panels : panel) * kScorePanelColumns,
                   static_cast<int>((in_scratch + (squares ? a.unit_count : 0)) * a.unit_rows), 0, 0);
        }
      }
    }
  } while (!item.end);
}

// The warps that make rows (common/energies/unit_rows.cuh).
template <typename T, int COLUMNS, int ROWS, bool SKETCH>
struct RowPooler {
  static constexpr int kThreads = 32 * ScoreShape<COLUMNS, SKETCH>::kPoolWarps;

  const ScoreArgs& a;
  const ScorePlan& plan;
  const ScoreLayout& layout;
  char* shared;
  ScoreControl& c;
  int thread; // of the pooling warpgroups

  // Columns beyond head_dim stay zero.
  __device__ void Clear() const {
    for (int i = thread; i < layout.k / 16; i += kThreads) reinterpret_cast<uint4*>(shared)[i] = uint4{0, 0, 0, 0};
    NamedBarrierSync(1, kThreads);
  }

  __device__ void Run() const {
    Clear();
    const UnitRows<T, COLUMNS, ROWS, SKETCH, kThreads> unit_rows{a, plan, plan.panels};
    RingPosition ring;
    int i = thread;
    for (bool end = false; !end;) {
      for (int set = 0; set < plan.sets; ++set, ring.Advance(plan.q_buffers)) {
        BarrierWait(&c.placed[ring.stage], ring.parity);
        const ScoreItem& item = c.item[ring.stage];
        end = item.end;
        if (!end && item.steps > 0) {
          char* const rows = shared + ring.stage * layout.q_buffer;
          i = a.rows_aligned ? unit_rows.template Fill<true>(item, set, rows, i)
                             : unit_rows.template Fill<false>(item, set, rows, i);
          FenceAsyncProxy(); // before the products read these rows
        }
        BarrierArrive(&c.q_full[ring.stage]);
      }
    }
  }
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_LOAD_CUH_
