// Pooled rows of query units, made where products read them: each thread adds up eight columns of a row at a time.
// Neighbouring threads take neighbouring heads of a token, so that whole rows of tokens are read.
#ifndef FLASHPREFILL_CUDA_COMMON_ENERGIES_UNIT_ROWS_CUH_
#define FLASHPREFILL_CUDA_COMMON_ENERGIES_UNIT_ROWS_CUH_

#include "cuda/common/energies/pool_rows.cuh"
#include "cuda/common/energies/units.cuh"

namespace flashprefill::cuda {

template <typename T, int COLUMNS, int ROWS, bool SKETCH, int THREADS>
struct UnitRows {
  const ScoreArgs& a;
  const UnitPlan& plan;
  int panels; // of 64 columns per row

  // Where eight columns of a row of a set lie: bulk copies with the 128-byte swizzle would put them there.
  __device__ char* At(char* rows, int row, int chunk) const {
    return rows + chunk / 8 * (COLUMNS * kScorePanelBytes) + row * kScorePanelBytes + ((chunk ^ row) & 7) * 16;
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
    for (; i < count; i += THREADS) {
      const Part part = PartAt(item, set, rows, i);
      if (part.count == 0) continue;
      float mean[kColumns];
      MeanOfRows<T, VECTOR>(part.from, p.q.stride[1], part.count, part.column, p.head_dim, p.q.stride[3], mean);
      *reinterpret_cast<uint4*>(part.to) = Rounded<T>(mean);
      if constexpr (SKETCH) {
        ScaledSquares<T>(mean, a.square_scale);
        *reinterpret_cast<uint4*>(part.to + panels * COLUMNS * kScorePanelBytes) = Rounded<T>(mean);
      }
    }
    return i - count;
  }
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ENERGIES_UNIT_ROWS_CUH_
