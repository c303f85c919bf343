// Loads of the score kernel. One thread streams key data. Rows of queries come as they are, by
// a second thread, or are made here: warps read the raw rows, add them up and write the means as products want them, so
// that the memory's work and the arithmetic of the item before run side by side.
#ifndef FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_LOAD_CUH_
#define FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_LOAD_CUH_

#include "cuda/sm90/energies/pool_rows.cuh"
#include "cuda/sm90/energies/score_plan.cuh"

namespace flashprefill::cuda {

// One thread: key data of all steps of all items, through the ring.
__device__ inline void ProduceKeys(const ScoreArgs& a, const ScorePlan& plan, const ScoreLayout& layout, char* shared,
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
__device__ void ProduceRows(const ScoreArgs& a, const ScorePlan& plan, const ScoreLayout& layout, char* shared,
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

// The warps that make rows: each thread adds up eight columns of a row at a time. Neighbouring threads take
// neighbouring heads of a token, so that whole rows of tokens are read.
template <typename T, int COLUMNS, int ROWS, bool SKETCH>
struct RowPooler {
  using Shape = ScoreShape<COLUMNS, SKETCH>;

  const ScoreArgs& a;
  const ScorePlan& plan;
  const ScoreLayout& layout;
  char* shared;
  ScoreControl& c;
  int thread; // of the pooling warpgroups

  // Where eight columns of a row of a set lie: bulk copies with the 128-byte swizzle would put them there.
  __device__ char* At(char* rows, int row, int chunk) const {
    return rows + chunk / 8 * (COLUMNS * kScorePanelBytes) + row * kScorePanelBytes + ((chunk ^ row) & 7) * 16;
  }

  // Columns beyond head_dim stay zero.
  __device__ void Clear() const {
    for (int i = thread; i < layout.k / 16; i += 32 * Shape::kPoolWarps) {
      reinterpret_cast<uint4*>(shared)[i] = uint4{0, 0, 0, 0};
    }
    NamedBarrierSync(1, 32 * Shape::kPoolWarps);
  }

  // Eight columns of a row: the mean of `count` rows from `from` on. No rows: nothing to do.
  struct Part {
    const T* from;
    int count, column;
    char* to;
  };

  __device__ Part PartAt(const ScoreItem& item, int set, char* rows, int i) const {
    const Problem& p = a.d.p;
    const TileRules& r = a.rules;
    const int chunks = (p.head_dim + kColumns - 1) / kColumns;
    // columns fastest, then heads of the tile, units, and rows of a head
    const int by_column = plan.by_chunks(i), chunk = i - by_column * chunks;
    const int by_head = plan.by_heads(by_column), in_tile = by_column - by_head * r.heads_per_tile;
    const int u = by_head & (plan.units - 1), j = by_head >> plan.log2_units;
    const int unit = item.first + set * plan.units + u, tile = r.by_units(unit);
    const int begin = tile * r.tile_tokens + j * a.query_pool;
    const int end = min(min((tile + 1) * r.tile_tokens, item.sequence.q_len), begin + a.query_pool);
    Part part{nullptr, 0, chunk * kColumns, nullptr};
    if (j < a.rows_per_head && unit < item.units && tile < FirstDenseTile(r, item.sequence) && begin < end) {
      const int head = (item.kv * r.units_per_kv + unit - tile * r.units_per_kv) * r.heads_per_tile + in_tile;
      part.from = static_cast<const T*>(p.q.data) + RowOffsetAt(p, p.q.stride, item.sequence, begin, head);
      part.count = end - begin;
      part.to = At(rows, u * ROWS + j * r.heads_per_tile + in_tile, chunk);
    }
    return part;
  }

  // This thread's parts of a set, from part i on; returns where it goes on in the next set. So a warp that has one part
  // less in this set has one more in the next.
  template <bool VECTOR>
  __device__ int Fill(const ScoreItem& item, int set, char* rows, int i) const {
    const Problem& p = a.d.p;
    const int count = a.rows_per_head * plan.units * a.rules.heads_per_tile * ((p.head_dim + kColumns - 1) / kColumns);
    for (; i < count; i += 32 * Shape::kPoolWarps) {
      const Part part = PartAt(item, set, rows, i);
      if (part.count == 0) continue;
      float mean[kColumns];
      MeanOfRows<T, VECTOR>(part.from, p.q.stride[1], part.count, part.column, p.head_dim, p.q.stride[3], mean);
      *reinterpret_cast<uint4*>(part.to) = Rounded<T>(mean);
      if constexpr (SKETCH) {
        ScaledSquares<T>(mean, a.square_scale);
        *reinterpret_cast<uint4*>(part.to + plan.panels * COLUMNS * kScorePanelBytes) = Rounded<T>(mean);
      }
    }
    FenceAsyncProxy(); // before the products read these rows
    return i - count;
  }

  __device__ void Run() const {
    Clear();
    RingPosition ring;
    int i = thread;
    for (bool end = false; !end;) {
      for (int set = 0; set < plan.sets; ++set, ring.Advance(plan.q_buffers)) {
        BarrierWait(&c.placed[ring.stage], ring.parity);
        const ScoreItem& item = c.item[ring.stage];
        end = item.end;
        if (!end && item.steps > 0) {
          char* const rows = shared + ring.stage * layout.q_buffer;
          i = a.rows_aligned ? Fill<true>(item, set, rows, i) : Fill<false>(item, set, rows, i);
        }
        BarrierArrive(&c.q_full[ring.stage]);
      }
    }
  }
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_LOAD_CUH_
