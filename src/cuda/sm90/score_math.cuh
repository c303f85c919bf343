// A math warpgroup of the score kernel: products, energies, and bits from them. score.cu says how and why.
#ifndef FLASHPREFILL_CUDA_SM90_SCORE_MATH_CUH_
#define FLASHPREFILL_CUDA_SM90_SCORE_MATH_CUH_

#include "cuda/common/wgmma.cuh"
#include "cuda/sm90/keep.cuh"
#include "cuda/sm90/score_plan.cuh"

namespace flashprefill::cuda {

constexpr float kLargeSum = 1.2e30f; // 2^100: 40 such sums still fit a float

__device__ inline bool IsFinite(float x) { return fabsf(x) < INFINITY; }

// A math warpgroup. COLUMNS query rows, ROWS of them a unit.
template <typename T, int PANELS, int COLUMNS, int ROWS, bool SKETCH>
struct Scorer {
  static constexpr int kUnits = COLUMNS / ROWS;
  static constexpr int kSlices = ROWS / 8; // of 8 columns a unit: 2 scores of each of two rows a thread
  using Scores = float[COLUMNS / 2];

  const ScoreArgs& a;
  const ScorePlan& plan;
  const ScoreLayout& layout;
  char* shared;
  ScoreControl& c;
  int group, warp, lane;        // warpgroup, warp in it, lane
  ScoreRing k_next, k_released; // stages: to be multiplied, to be given back
  float* energies;

  ScoreItem item;
  uint32_t q_address;
  unsigned live; // bit u: unit u is scored
  int all_full;  // blocks that every column of every live unit sees
  float reference[kUnits];
  float sum[2][kUnits]; // of the block in row lane / 4, and of the one 8 rows on

  __device__ void Sync() const { NamedBarrierSync(1 + group, 128); }

  // Units and column limits of the item, into shared memory; a barrier on both sides keeps them from their readers.
  __device__ void SetUp() {
    const TileRules& r = a.rules;
    const int thread = 32 * warp + lane;
    const int first = item.first + group * plan.units;
    const int first_dense = item.steps > 0 ? FirstDenseTile(r, item.sequence) : 0;
    auto limit_of = [&](const DeviceTile& tile, int j) {
      const int begin = tile.begin + j * a.query_pool;
      if (begin >= tile.end) return 0;
      const int position = item.sequence.prefix + min(begin + a.query_pool, tile.end) - 1;
      return r.shared ? min(r.by_block(position) + 1, tile.scored) : r.by_block(position + 1);
    };
    if (thread < COLUMNS) {
      const int u = thread / ROWS, row = thread % ROWS;
      const int tile_index = r.by_units(first + u);
      int limit = 0;
      if (group < plan.groups && u < plan.units && first + u < item.units && tile_index < first_dense &&
          row < a.rows_a_head * r.heads_a_tile) {
        limit = limit_of(TileAt(a.d.p, r, item.sequence, tile_index), plan.by_heads(row));
      }
      c.limit[group][thread] = limit;
    }
    if (thread < kUnits) {
      ScoreUnit unit{0, 0, r.by_units(first + thread), false};
      if (group < plan.groups && thread < plan.units && first + thread < item.units) {
        unit.dense = unit.tile >= first_dense;
        if (item.steps == 0) unit.dense = true; // all forced, or all in the dense tail
        if (!unit.dense) {
          const DeviceTile tile = TileAt(a.d.p, r, item.sequence, unit.tile);
          unit.scored = tile.scored;
          const bool whole = tile.end - tile.begin == r.tile_tokens && a.rows_a_head * r.heads_a_tile == ROWS;
          unit.full = whole ? limit_of(tile, 0) : 0;
        }
      }
      c.unit[group][thread] = unit;
    }
    Sync();
    live = 0;
    all_full = 1 << 30;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const ScoreUnit unit = c.unit[group][u];
      if (unit.scored > 0) {
        live |= 1u << u;
        all_full = min(all_full, unit.full);
      }
      reference[u] = -INFINITY;
      sum[0][u] = sum[1][u] = 0;
    }
  }

  // Starts the product of the next PLANES planes (two: queries with means plus squares with variances) into scores.
  template <int PLANES>
  __device__ __forceinline__ void Issue(Scores& scores) {
    uint64_t k[PLANES];
#pragma unroll
    for (int s = 0; s < PLANES; ++s) {
      BarrierWait(&c.k_full[k_next.stage], k_next.round);
      k[s] = DescribeKMajor(SharedAddress(shared + layout.k + k_next.stage * layout.k_stage));
      k_next.Advance(plan.k_stages);
    }
    WgmmaFence();
#pragma unroll
    for (int s = 0; s < PLANES; ++s) {
      const uint64_t q = DescribeKMajor(q_address + s * PANELS * COLUMNS * kScorePanelBytes);
#pragma unroll
      for (int slice = 0; slice < 4 * PANELS; ++slice) { // 16 columns: 32 bytes; addresses count in units of 16
        Wgmma<T>::SS(scores, k[s] + slice / 4 * (kStepBlocks * kScorePanelBytes / 16) + slice % 4 * 2,
                     q + slice / 4 * (COLUMNS * kScorePanelBytes / 16) + slice % 4 * 2, s + slice > 0);
      }
    }
    WgmmaCommit();
  }

  __device__ __forceinline__ void Release(int stages) {
    for (int i = 0; i < stages; ++i) {
      if (lane == 0) BarrierArrive(&c.k_empty[k_released.stage]);
      k_released.Advance(plan.k_stages);
    }
  }

  // A score of unit u in base 2, of its slice of 8 columns, the two rows and the two columns in it that a thread has;
  // -inf if the column does not see the block.
  __device__ __forceinline__ float MaskedScore(const Scores& scores, int u, int slice, int half, int column,
                                               int block) {
    const int index = u * kSlices + slice;
    return block + 8 * half < c.limit[group][8 * index + 2 * (lane % 4) + column]
               ? scores[4 * index + 2 * half + column] * a.scale_log2
               : -INFINITY;
  }

  // Adds the step's exponentials to the sums, `weight` times, where every column sees every block of the warp. False,
  // and nothing done, if that needs care.
  __device__ __forceinline__ bool AddUp(const Scores& scores, float weight) {
    float x[2][kUnits];
    bool careful = false;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const float offset = -reference[u];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        x[half][u] = 0;
#pragma unroll
        for (int i = 0; i < 2 * kSlices; ++i) {
          x[half][u] += Exp2(fmaf(scores[4 * (u * kSlices + i / 2) + 2 * half + i % 2], a.scale_log2, offset));
        }
        careful |= (live >> u & 1) && !(x[half][u] < kLargeSum);
      }
    }
    if (__any_sync(~0u, careful)) return false;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      sum[0][u] = SKETCH ? fmaf(weight, x[0][u], sum[0][u]) : x[0][u];
      sum[1][u] = SKETCH ? fmaf(weight, x[1][u], sum[1][u]) : x[1][u];
    }
    return true;
  }

  // A first reference for each unit: the largest score that counts of its first eight columns. Where there is none it
  // is -inf, and AddUp asks for care.
  __device__ __forceinline__ void StartReferences(const Scores& scores, int block) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float largest = -INFINITY;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float z = MaskedScore(scores, u, 0, i / 2, i % 2, block);
        if (IsFinite(z)) largest = fmaxf(largest, z);
      }
      reference[u] = WarpMax(largest);
    }
  }

  // The same with a mask, a new reference, the largest score so far, and without scores that are not finite.
  __device__ __forceinline__ void AddUpCarefully(const Scores& scores, int block, float weight) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float largest = -INFINITY;
#pragma unroll
      for (int i = 0; i < 4 * kSlices; ++i) {
        const float z = MaskedScore(scores, u, i / 4, i / 2 % 2, i % 2, block);
        if (IsFinite(z)) largest = fmaxf(largest, z);
      }
      largest = fmaxf(WarpMax(largest), reference[u]);
      // Nothing finite yet: nothing is added, and the reference stays -inf, which leads here again.
      const float base = largest == -INFINITY ? 0.f : largest;
      const float rescale = Exp2(reference[u] - base);
      reference[u] = largest;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = 0;
#pragma unroll
        for (int i = 0; i < 2 * kSlices; ++i) {
          const float z = MaskedScore(scores, u, i / 2, half, i % 2, block);
          if (IsFinite(z)) x += Exp2(z - base);
        }
        sum[half][u] = sum[half][u] * rescale + weight * x;
      }
    }
  }

  // The sums are complete but for the four lanes of a row: these exchange halves, so that each ends with a quarter of
  // the (row, unit) pairs, and stores those. Three shuffles for four pairs instead of eight.
  __device__ void Store(int step) {
    const bool second_row = lane & 1, second_half = lane & 2;
    float row[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const float other = __shfl_xor_sync(~0u, second_row ? sum[0][u] : sum[1][u], 1);
      row[u] = (second_row ? sum[1][u] : sum[0][u]) + other;
      sum[0][u] = sum[1][u] = 0;
    }
    const int block = step * kStepBlocks + 16 * warp + lane / 4 + (second_row ? 8 : 0);
    if constexpr (kUnits == 1) {
      const float total = row[0] + __shfl_xor_sync(~0u, row[0], 2);
      if (!second_half && (live & 1)) energies[block] = __log2f(total) + reference[0];
    } else {
      constexpr int kHalf = kUnits / 2;
#pragma unroll
      for (int u = 0; u < kHalf; ++u) {
        const float other = __shfl_xor_sync(~0u, second_half ? row[u] : row[u + kHalf], 2);
        const float total = (second_half ? row[u + kHalf] : row[u]) + other;
        const int unit = second_half ? u + kHalf : u;
        const float base = second_half ? reference[u + kHalf] : reference[u];
        if (live >> unit & 1) energies[unit * plan.energy_stride + block] = __log2f(total) + base;
      }
    }
  }

  // Product i of Products is done: its stages go back, and its exponentials are added up.
  __device__ __forceinline__ void Finish(const Scores& scores, int i, int sketch_step) {
    const bool spread = SKETCH && i == 0; // means and variances, in the name of all keys but the outliers
    const int step = SKETCH ? sketch_step : i;
    Release(spread ? 2 : 1);
    const float weight = spread ? static_cast<float>(a.rules.block_size - a.outliers) : 1.f; // scored blocks are whole
    const int warp_block = step * kStepBlocks + 16 * warp, block = warp_block + lane / 4;
    bool done = false;
    if (warp_block + 16 <= all_full) {
      if (i == 0 && step == 0) StartReferences(scores, block);
      done = AddUp(scores, weight);
    }
    if (!done) AddUpCarefully(scores, block, weight);
    if (!SKETCH) Store(step);
  }

  // FlashPrefill: a product for each step of the item. Sketch: those of one step, the first of two planes. One product
  // is in flight while the one before it is added up. The end stands apart, because the compiler overlaps products only
  // if it sees on every path which of them are done.
  __device__ __forceinline__ void Products(int count, int sketch_step) {
    Scores even, odd;
    int i = 0;
    Issue<SKETCH ? 2 : 1>(even);
    for (; i + 2 < count; i += 2) {
      Issue<1>(odd);
      WgmmaWait<1>();
      Finish(even, i, sketch_step);
      Issue<1>(even);
      WgmmaWait<1>();
      Finish(odd, i + 1, sketch_step);
    }
    const bool two = i + 2 == count;
    if (two) {
      Issue<1>(odd);
      WgmmaWait<1>();
    } else {
      WgmmaWait<0>();
    }
    Finish(even, i, sketch_step);
    if (two) {
      WgmmaWait<0>();
      Finish(odd, i + 1, sketch_step);
    }
  }

  __device__ __forceinline__ void Steps(int steps) {
    if constexpr (SKETCH) {
      for (int step = 0; step < steps; ++step) {
        Products(1 + a.outliers, step);
        Store(step);
      }
    } else {
      if (steps > 0) Products(steps, 0);
    }
  }

  // Bits from complete energies: a warp takes every fourth unit; one or two units are shared by the four warps.
  __device__ void WriteUnits() {
    const TileRules& r = a.rules;
    const bool share = plan.log2_units < 2;
    const int log2_parts = share ? 2 - plan.log2_units : 0;
    const int first = warp & (plan.units - 1), part = share ? warp >> plan.log2_units : 0;
    int kept = 0;
    int64_t row = -1;
    for (int u = share ? first : warp; u < plan.units && group < plan.groups; u += 4) {
      const int index = item.first + group * plan.units + u;
      if (index >= item.units) break;
      const ScoreUnit unit = c.unit[group][u];
      const DeviceTile tile = TileAt(a.d.p, r, item.sequence, unit.tile);
      const int mask_row = item.sequence.TileBase(r) + unit.tile;
      if (mask_row >= r.tile_rows) break;
      row = (int64_t{item.kv} * r.units_a_kv + index - unit.tile * r.units_a_kv) * r.tile_rows + mask_row;
      MaskRow what{unit.scored, tile.visible, r.sink_blocks, WindowBegin(r, tile)};
      if (unit.dense) what.sink = tile.visible;
      kept = WriteMaskRow(a.keep, what, energies + u * plan.energy_stride,
                          reinterpret_cast<uint32_t*>(a.bits + row * a.words), static_cast<int>(2 * a.words), part,
                          log2_parts);
      if (!share && a.counts && lane == 0) a.counts[row] = kept;
    }
    if (share && lane == 0) c.kept[group][warp] = kept;
    Sync(); // energies and units are free for the next item
    if (share && part == 0 && row >= 0 && a.counts && lane == 0) {
      for (int w = first + plan.units; w < 4; w += plan.units) kept += c.kept[group][w];
      a.counts[row] = kept;
    }
  }

  __device__ void Run() {
    ScoreRing q_ring;
    for (;;) {
      const int stage = q_ring.stage;
      BarrierWait(&c.q_full[stage], q_ring.round);
      q_ring.Advance(plan.q_stages);
      item = c.item[stage];
      if (item.end) return;
      q_address = SharedAddress(shared + stage * layout.q_stage + (group < plan.groups ? group : 0) * layout.q_group);
      SetUp();
      Steps(__shfl_sync(~0u, item.steps, 0)); // the compiler sees that the warp agrees
      __syncwarp();
      if (lane == 0) BarrierArrive(&c.q_empty[stage]); // the queries are no longer needed
      Sync();
      WriteUnits();
    }
  }
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_SCORE_MATH_CUH_
