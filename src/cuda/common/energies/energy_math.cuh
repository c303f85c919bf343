// Energies of units from scores, and bits from energies, by a group of four warps: of the product's 64 key blocks each
// warp has 16, a thread of them rows lane / 4 and lane / 4 + 8, and of each 8 query rows columns 2 (lane % 4) and the
// next. So wgmma and mma.sync alike leave them; the kernels differ in how products come about.
//
// Exponentials need a common reference, and any will do: a warp keeps one for each of its units, the largest score of
// the first 16 blocks it sees. An energy is stored as its logarithm with the reference added back, so warps need not
// agree. Only where a sum gets too large, or is no number, the step is done again carefully: that sets a new reference
// and leaves out non-finite scores. So there is no maximum in the loop: a multiply-add, an exp2 and an add for each
// score, and a comparison more in the steps that the diagonal cuts.
//
// Units of four or two rows share a slice of 8 columns, which lie with other lanes each: a thread knows one unit per
// slice, so that units are twice or four times as many in the same registers.
#ifndef FLASHPREFILL_CUDA_COMMON_ENERGIES_ENERGY_MATH_CUH_
#define FLASHPREFILL_CUDA_COMMON_ENERGIES_ENERGY_MATH_CUH_

#include "cuda/common/energies/units.cuh"
#include "cuda/common/ptx.cuh"

namespace flashprefill::cuda {

// COLUMNS query rows, ROWS of them per unit. HALF: energies may be of 16 bits.
template <int COLUMNS, int ROWS, bool SKETCH, bool HALF>
struct EnergyMath {
  static constexpr int kUnits = COLUMNS / ROWS;
  static constexpr int kSplit = ROWS < 8 ? 8 / ROWS : 1; // units per slice of 8 columns; 4 / kSplit lanes have each
  static constexpr int kOwn = kUnits / kSplit;           // units of which a thread has columns
  static constexpr int kSlices =
      ROWS < 8 ? 1 : ROWS / 8; // of 8 columns per unit: 2 scores of each of two rows per thread
  using Scores = float[COLUMNS / 2];

  const ScoreArgs& a;
  const UnitPlan& plan;
  UnitControl& c;
  int group, warp, lane; // group of four warps, warp in it, lane
  int set, member;       // of units, and which of its team this group is
  char* energies;        // of the set: floats, or (HALF) 16 bits each, relative to c.base
  uint32_t* bins;        // this warp's, to look for a mass; or null

  unsigned live; // bit u: unit u is scored
  int all_full;  // blocks that every column of every live unit sees
  int most;      // blocks that some live unit scores
  float reference[kOwn];
  float sum[2][kOwn]; // of the block in row lane / 4, and of the one 8 rows on

  // The unit that this thread's columns of a slice belong to, or with more rows the slice's.
  __device__ __forceinline__ int UnitOf(int own) const {
    return kSplit == 1 ? own : own * kSplit + lane % 4 / (4 / kSplit);
  }

  // The largest of all lanes that have columns of the same unit.
  __device__ __forceinline__ static float UnitMax(float x) {
    if constexpr (kSplit == 1) {
      return WarpMax(x);
    } else {
#pragma unroll
      for (int offset = 16; offset; offset /= 2) {
        if (offset >= 4 || offset < 4 / kSplit) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
      }
      return x;
    }
  }

  __device__ void Sync() const { NamedBarrierSync(2 + group, 128); }
  __device__ void SyncTeam() const { NamedBarrierSync(2 + kScoreGroups + set, 128 << plan.log2_team); }

  // Units and column limits of the item, into shared memory; a barrier on both sides keeps them from their readers.
  __device__ void SetUp(const ScoreItem& item) {
    const TileRules& r = a.rules;
    const int thread = 32 * warp + lane;
    const int first = item.first + set * plan.units;
    const int first_dense = item.steps > 0 ? FirstDenseTile(r, item.sequence) : 0; // else nothing is left to choose
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
      if (u < plan.units && first + u < item.units && tile_index < first_dense &&
          row < a.rows_per_head * r.heads_per_tile) {
        limit = limit_of(TileAt(a.d.p, r, item.sequence, tile_index), plan.by_heads(row));
      }
      c.limit[group][thread] = limit;
    }
    if (thread < kUnits) {
      ScoreUnit unit{0, -1, {}};
      const int index = first + thread, tile_index = r.by_units(index);
      const int tile_row = item.sequence.TileBase(r) + tile_index;
      if (thread < plan.units && index < item.units && tile_row < r.tile_rows) {
        const DeviceTile tile = TileAt(a.d.p, r, item.sequence, tile_index);
        const bool dense = tile_index >= first_dense;
        const bool whole = tile.end - tile.begin == r.tile_tokens && a.rows_per_head * r.heads_per_tile == ROWS;
        unit.full = whole && !dense ? limit_of(tile, 0) : 0;
        unit.row = (item.kv * r.units_per_kv + index - tile_index * r.units_per_kv) * r.tile_rows + tile_row;
        unit.bits = {dense ? 0 : tile.scored, tile.visible, dense ? tile.visible : r.sink_blocks, WindowBegin(r, tile)};
      }
      c.unit[group * kUnits + thread] = unit;
    }
    Sync();
    live = 0;
    all_full = 1 << 30;
    most = 0;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const ScoreUnit& unit = c.unit[group * kUnits + u];
      if (unit.bits.scored > 0) {
        live |= 1u << u;
        all_full = min(all_full, unit.full);
        most = max(most, unit.bits.scored);
      }
    }
#pragma unroll
    for (int u = 0; u < kOwn; ++u) {
      reference[u] = -INFINITY;
      sum[0][u] = sum[1][u] = 0;
    }
  }

  // A score of the thread's unit u in base 2, of its slice of 8 columns, the two rows and the two columns in it that a
  // thread has; -inf if the column does not see the block.
  __device__ __forceinline__ float MaskedScore(const Scores& scores, int u, int slice, int half, int column,
                                               int block) {
    const int index = u * kSlices + slice;
    return block + 8 * half < c.limit[group][8 * index + 2 * (lane % 4) + column]
               ? scores[4 * index + 2 * half + column] * a.exponent_scale
               : -INFINITY;
  }

  // Adds the step's exponentials to the sums, `weight` times. MASK: some column does not see some block of the warp.
  // False, and nothing done, if that needs care.
  template <bool MASK>
  __device__ __forceinline__ bool AddUp(const Scores& scores, int block, float weight) {
    float x[2][kOwn];
    bool careful = false;
#pragma unroll
    for (int u = 0; u < kOwn; ++u) {
      const float offset = -reference[u];
      x[0][u] = x[1][u] = 0;
#pragma unroll
      for (int i = 0; i < 2 * kSlices; ++i) {
        const int index = u * kSlices + i / 2;
        const int limit = MASK ? c.limit[group][8 * index + 2 * (lane % 4) + i % 2] : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float z = fmaf(scores[4 * index + 2 * half + i % 2], a.exponent_scale, offset);
          x[half][u] += Exp2(!MASK || block + 8 * half < limit ? z : -INFINITY);
        }
      }
      careful |= (live >> UnitOf(u) & 1) && !(x[0][u] < kLargeSum && x[1][u] < kLargeSum);
    }
    if (__any_sync(~0u, careful)) return false;
#pragma unroll
    for (int u = 0; u < kOwn; ++u) {
      sum[0][u] = SKETCH ? fmaf(weight, x[0][u], sum[0][u]) : x[0][u];
      sum[1][u] = SKETCH ? fmaf(weight, x[1][u], sum[1][u]) : x[1][u];
    }
    return true;
  }

  // A first reference for each unit: the largest score that counts of its first eight columns, or of those that it has.
  // Where there is none it is -inf, and AddUp asks for care.
  __device__ __forceinline__ void StartReferences(const Scores& scores, int block) {
#pragma unroll
    for (int u = 0; u < kOwn; ++u) {
      float largest = -INFINITY;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float z = MaskedScore(scores, u, 0, i / 2, i % 2, block);
        if (IsFinite(z)) largest = fmaxf(largest, z);
      }
      reference[u] = UnitMax(largest);
    }
  }

  // The same with a mask, a new reference, the largest score so far, and without scores that are not finite.
  __device__ __forceinline__ void AddUpCarefully(const Scores& scores, int block, float weight) {
#pragma unroll
    for (int u = 0; u < kOwn; ++u) {
      float largest = -INFINITY;
#pragma unroll
      for (int i = 0; i < 4 * kSlices; ++i) {
        const float z = MaskedScore(scores, u, i / 4, i / 2 % 2, i % 2, block);
        if (IsFinite(z)) largest = fmaxf(largest, z);
      }
      largest = fmaxf(UnitMax(largest), reference[u]);
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

  // Sets the base of energies of 16 bits: the references with which the team's first warp began, weighted by the
  // keys of the first product, so that energies are small and their eleven bits good for a thousandth.
  __device__ void ShareBase() {
    if (plan.energy_bytes == sizeof(float)) return;
    const bool first_of_unit = kSplit == 1 ? lane == 0 : lane < 4 && lane % (4 / kSplit) == 0;
    if (member == 0 && warp == 0 && first_of_unit) {
      const float keys = __log2f(Weight(true));
#pragma unroll
      for (int u = 0; u < kOwn; ++u) {
        c.base[set * kUnits + UnitOf(u)] = reference[u] > -INFINITY ? reference[u] + keys : 0.f;
      }
    }
    SyncTeam();
  }

  __device__ __forceinline__ void StoreEnergy(int unit, int block, float energy) {
    const int at = unit * plan.energy_stride + block;
    if (!HALF || plan.energy_bytes == sizeof(float)) {
      reinterpret_cast<float*>(energies)[at] = energy;
    } else {
      reinterpret_cast<__half*>(energies)[at] = __float2half_rn(energy - c.base[set * kUnits + unit]);
    }
  }

  // The sums are complete but for the lanes that share a row and a unit, four with units of eight rows and more: these
  // exchange halves, so that each ends with a quarter of the (row, unit) pairs, and stores those. Three shuffles for
  // four pairs instead of eight. Two lanes exchange once, and one has the sums of its two rows.
  __device__ void Store(int step) {
    const int first_block = step * kStepBlocks + 16 * warp + lane / 4;
    if constexpr (kSplit == 4) {
#pragma unroll
      for (int u = 0; u < kOwn; ++u) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (live >> UnitOf(u) & 1) {
            StoreEnergy(UnitOf(u), first_block + 8 * half, __log2f(sum[half][u]) + reference[u]);
          }
          sum[half][u] = 0;
        }
      }
      return;
    }
    const bool second_row = lane & 1, second_half = lane & 2;
    float row[kOwn];
#pragma unroll
    for (int u = 0; u < kOwn; ++u) {
      const float other = __shfl_xor_sync(~0u, second_row ? sum[0][u] : sum[1][u], 1);
      row[u] = (second_row ? sum[1][u] : sum[0][u]) + other;
      sum[0][u] = sum[1][u] = 0;
    }
    const int block = first_block + (second_row ? 8 : 0);
    if constexpr (kSplit == 2) {
#pragma unroll
      for (int u = 0; u < kOwn; ++u) {
        if (live >> UnitOf(u) & 1) StoreEnergy(UnitOf(u), block, __log2f(row[u]) + reference[u]);
      }
    } else if constexpr (kUnits == 1) {
      const float total = row[0] + __shfl_xor_sync(~0u, row[0], 2);
      if (!second_half && (live & 1)) StoreEnergy(0, block, __log2f(total) + reference[0]);
    } else {
      constexpr int kHalf = kUnits / 2;
#pragma unroll
      for (int u = 0; u < kHalf; ++u) {
        const float other = __shfl_xor_sync(~0u, second_half ? row[u] : row[u + kHalf], 2);
        const float total = (second_half ? row[u + kHalf] : row[u]) + other;
        const int unit = second_half ? u + kHalf : u;
        const float base = second_half ? reference[u + kHalf] : reference[u];
        if (live >> unit & 1) StoreEnergy(unit, block, __log2f(total) + base);
      }
    }
  }

  // Exponentials of a product's scores are added up in the name of `weight` keys. The first ones of an item set the
  // references.
  __device__ __forceinline__ void Finish(const Scores& scores, int step, bool first, float weight) {
    const int warp_block = step * kStepBlocks + 16 * warp, block = warp_block + lane / 4;
    if (warp_block >= most) return;
    if (first) StartReferences(scores, block);
    const bool done =
        warp_block + 16 <= all_full ? AddUp<false>(scores, block, weight) : AddUp<true>(scores, block, weight);
    if (!done) AddUpCarefully(scores, block, weight);
  }

  // Of Sketch, means and variances make one score, in the name of all keys but the outliers; scored blocks are whole.
  __device__ __forceinline__ float Weight(bool spread) const {
    return spread ? static_cast<float>(a.rules.block_size - a.outliers) : 1.f;
  }

  // Bits from complete energies: the warps take units in turn; one or two units are shared by four warps.
  __device__ void WriteUnits() {
    const bool share = plan.log2_units < 2;
    const int log2_parts = share ? 2 - plan.log2_units : 0;
    const int first = share ? warp & (plan.units - 1) : 4 * member + warp, part = share ? warp >> plan.log2_units : 0;
    int kept = 0, row = -1;
    for (int u = share && member > 0 ? plan.units : first; u < plan.units; u += 4 << plan.log2_team) {
      const ScoreUnit& unit = c.unit[group * kUnits + u];
      row = unit.row;
      if (row < 0) break;
      auto* const bits = reinterpret_cast<uint32_t*>(a.bits + row * a.words);
      char* const from = energies + u * plan.energy_stride * plan.energy_bytes;
      auto write = [&](auto* of_unit) {
        return WriteMaskRow<SKETCH>(a.keep, unit.bits, of_unit, bits, static_cast<int>(2 * a.words), part, log2_parts,
                                    bins);
      };
      if (!HALF || plan.energy_bytes == sizeof(float)) {
        kept = write(reinterpret_cast<float*>(from));
      } else {
        kept = write(reinterpret_cast<__half*>(from));
      }
      if (!share && a.counts && lane == 0) a.counts[row] = kept;
    }
    if (share && lane == 0) c.kept[group][warp] = kept;
    SyncTeam(); // energies and units are free for the next item
    if (share && part == 0 && row >= 0 && a.counts && lane == 0) {
      for (int w = first + plan.units; w < 4; w += plan.units) kept += c.kept[group][w];
      a.counts[row] = kept;
    }
  }
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ENERGIES_ENERGY_MATH_CUH_
