// What becomes of a strip's scores: powers of two, their sums by block, and for each row and key tile the largest
// exponent and the sum. A warp has 16 rows and all 256 cells; a thread of them rows lane / 4 and lane / 4 + 8, and of
// each 8 cells 2 (lane % 4) and the next, as wgmma and mma.sync leave them.
#ifndef FLASHPREFILL_CUDA_COMMON_STRIDED_CELL_MATH_CUH_
#define FLASHPREFILL_CUDA_COMMON_STRIDED_CELL_MATH_CUH_

#include "cuda/common/ptx.cuh"
#include "cuda/common/strided/strips.cuh"

namespace flashprefill::cuda {

// The larger one; no number if one of them is none.
__device__ __forceinline__ float MaxOrNan(float a, float b) {
  float x;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
}

struct CellMath {
  const StridedArgs& a;
  const StripPlan& plan;
  float exponent_scale;
  char* staging; // of this warp
  int warp, lane;

  // The largest and the sum of a row's exponents and powers: first inside a thread, then over the row's four lanes.
  static __device__ __forceinline__ float RowMax(const float (&part)[4]) {
    float x = MaxOrNan(MaxOrNan(part[0], part[1]), MaxOrNan(part[2], part[3]));
    x = MaxOrNan(x, __shfl_xor_sync(~0u, x, 1));
    return MaxOrNan(x, __shfl_xor_sync(~0u, x, 2));
  }
  static __device__ __forceinline__ float RowSum(const float (&part)[4]) {
    float x = (part[0] + part[1]) + (part[2] + part[3]);
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
  }

  // Makes scores powers of two relative to the largest exponent of their row; stats: of both rows of a thread, that
  // exponent and the sum of powers. False, and nothing done, if some score is no number or infinite.
  __device__ __forceinline__ bool Exponentials(float (&scores)[kKeyTileCells / 2], float2 (&stats)[2]) const {
    float base[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float part[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll
      for (int i = 0; i < kKeyTileCells / 4; ++i) {
        part[i % 4] = MaxOrNan(part[i % 4], scores[4 * (i / 2) + 2 * half + i % 2]);
      }
      base[half] = RowMax(part) * exponent_scale;
    }
    if (__any_sync(~0u, !(fabsf(base[0]) < INFINITY) || !(fabsf(base[1]) < INFINITY))) return false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float part[4] = {};
#pragma unroll
      for (int i = 0; i < kKeyTileCells / 4; ++i) {
        float& z = scores[4 * (i / 2) + 2 * half + i % 2];
        z = Exp2(fmaf(z, exponent_scale, -base[half]));
        part[i % 4] += z;
      }
      stats[half] = {base[half], RowSum(part)};
    }
    return true;
  }

  // The same for rows that see only columns [0, seen) of the key tile, and without scores that are not finite.
  __device__ __forceinline__ void CarefulExponentials(float (&scores)[kKeyTileCells / 2], const int (&seen)[2],
                                                      float2 (&stats)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int mine = seen[half] - 2 * (lane % 4);
      float part[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll
      for (int i = 0; i < kKeyTileCells / 4; ++i) {
        float& z = scores[4 * (i / 2) + 2 * half + i % 2];
        z *= exponent_scale;
        if (!(fabsf(z) < INFINITY) || 8 * (i / 2) + i % 2 >= mine) z = -INFINITY;
        part[i % 4] = fmaxf(part[i % 4], z);
      }
      const float largest = RowMax(part), base = largest == -INFINITY ? 0.f : largest;
#pragma unroll
      for (int i = 0; i < 4; ++i) part[i] = 0;
#pragma unroll
      for (int i = 0; i < kKeyTileCells / 4; ++i) {
        float& z = scores[4 * (i / 2) + 2 * half + i % 2];
        z = Exp2(z - base);
        part[i % 4] += z;
      }
      stats[half] = {largest, RowSum(part)};
    }
  }

  // Sums by block where a block is GROUPS groups of 8 columns. They end in shared memory, a row of block_pitch of them
  // for each of the warp's rows. The four lanes of a row add up four blocks at once: they exchange halves, so that each
  // ends with one block, three shuffles for four sums instead of eight.
  template <int GROUPS>
  __device__ __forceinline__ void BlockSums(const float (&scores)[kKeyTileCells / 2]) const {
    const bool odd = lane & 1, second = lane & 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      __half* const row = reinterpret_cast<__half*>(staging + (lane / 4 + 8 * half) * plan.staging_row);
#pragma unroll
      for (int block = 0; block < kKeyTileCells / 8 / GROUPS; block += 4) {
        float sum[4] = {};
#pragma unroll
        for (int i = 0; i < 4 * GROUPS; ++i) {
          const int k = block * GROUPS + i;
          sum[i / GROUPS] += scores[4 * k + 2 * half] + scores[4 * k + 2 * half + 1];
        }
        const float first = (odd ? sum[1] : sum[0]) + __shfl_xor_sync(~0u, odd ? sum[0] : sum[1], 1);
        const float last = (odd ? sum[3] : sum[2]) + __shfl_xor_sync(~0u, odd ? sum[2] : sum[3], 1);
        const float mine = (second ? last : first) + __shfl_xor_sync(~0u, second ? first : last, 2);
        row[block + lane % 4] = __float2half_rn(mine);
      }
    }
  }

  // The same for any multiple of 8 cells per block.
  __device__ __forceinline__ void BlockSums(const float (&scores)[kKeyTileCells / 2], int groups_per_block) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      __half* const row = reinterpret_cast<__half*>(staging + (lane / 4 + 8 * half) * plan.staging_row);
      float sum = 0;
      int left = groups_per_block, block = 0;
#pragma unroll
      for (int k = 0; k < kKeyTileCells / 8; ++k) {
        sum += scores[4 * k + 2 * half] + scores[4 * k + 2 * half + 1];
        if (--left == 0) {
          sum += __shfl_xor_sync(~0u, sum, 1);
          sum += __shfl_xor_sync(~0u, sum, 2);
          if (lane % 4 == block % 4) row[block] = __float2half_rn(sum);
          left = groups_per_block;
          sum = 0;
          ++block;
        }
      }
    }
  }

  // For blocks of any number of cells all powers go to shared memory instead.
  __device__ __forceinline__ void AllPowers(const float (&scores)[kKeyTileCells / 2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      __half2* const row = reinterpret_cast<__half2*>(staging + (lane / 4 + 8 * half) * plan.staging_row);
#pragma unroll
      for (int k = 0; k < kKeyTileCells / 8; ++k) {
        row[4 * k + lane % 4] = __floats2half2_rn(scores[4 * k + 2 * half], scores[4 * k + 2 * half + 1]);
      }
    }
  }

  // Sums of eight blocks of a row of powers.
  __device__ __forceinline__ uint4 EightSums(const char* row, int first_block) const {
    const StridedShape& g = a.shape;
    alignas(16) __half sums[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float sum = 0;
      const int block = first_block + j;
      const __half* const cells = reinterpret_cast<const __half*>(row) + block * g.cells_per_block;
      for (int i = 0; i < (block < g.key_tile_blocks ? g.cells_per_block : 0); ++i) sum += __half2float(cells[i]);
      sums[j] = __float2half_rn(sum);
    }
    return *reinterpret_cast<const uint4*>(sums);
  }

  __device__ __forceinline__ void Finish(float (&scores)[kKeyTileCells / 2], const StridedStrip& strip,
                                         int key_tile) const {
    const StridedShape& g = a.shape;
    const TileRules& r = a.rules;
    const int first_dense = FirstDenseTile(r, strip.sequence);
    const int units = r.units_per_kv, first_row = kStridedWarpRows * warp;
    // Rows of the strip that are scored come first: units in use, and of those the ones before the dense tail.
    const int live_units = min(strip.units, (first_dense - strip.first_tile) * units - strip.unit);
    const int live_rows = (live_units << g.log2_rows) - first_row; // of this warp
    const int64_t row =
        ((int64_t{strip.kv} * a.tiles + strip.local_tile) * units + strip.unit) * g.rows_per_unit + first_row;

    // Find the cells that each row sees.
    int seen[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int in_warp = lane / 4 + 8 * half, in_strip = first_row + in_warp;
      const int unit = strip.unit + (in_strip >> g.log2_rows), in_range = r.by_units(unit);
      const DeviceTile tile = TileAt(a.d.p, r, strip.sequence, strip.first_tile + in_range);
      const int head = strip.kv * units + unit - in_range * units;
      const int limit =
          in_warp < live_rows ? RowLimit(a, strip.sequence, tile, in_strip & (g.rows_per_unit - 1), head) : 0;
      seen[half] = min(limit - key_tile * g.key_tile_cells, g.key_tile_cells);
    }
    // Make powers of two, and keep the largest exponent and the sum of each row.
    float2 stats[2];
    const bool whole = __all_sync(~0u, min(seen[0], seen[1]) == kKeyTileCells);
    if (!(whole && Exponentials(scores, stats))) CarefulExponentials(scores, seen, stats);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int in_warp = lane / 4 + 8 * half;
      if (lane % 4 == 0 && in_warp < live_rows) a.stats[(row + in_warp) * g.key_tiles + key_tile] = stats[half];
    }
    // Add up by block.
    __syncwarp(); // the staging memory has been read
    if (!plan.whole_groups) {
      AllPowers(scores);
    } else if (g.cells_per_block == 8) {
      BlockSums<1>(scores);
    } else if (g.cells_per_block == 16) {
      BlockSums<2>(scores);
    } else {
      BlockSums(scores, g.cells_per_block / 8);
    }
    __syncwarp();
    // Write the sums.
    const int pieces = g.block_pitch / 8; // of 16 bytes per row
    for (int i = lane; i < min(live_rows, kStridedWarpRows) * pieces; i += 32) {
      const int in_warp = i / pieces, piece = i - in_warp * pieces;
      const char* const from = staging + in_warp * plan.staging_row;
      const uint4 sums =
          plan.whole_groups ? *reinterpret_cast<const uint4*>(from + 16 * piece) : EightSums(from, 8 * piece);
      *reinterpret_cast<uint4*>(a.sums + ((row + in_warp) * g.key_tiles + key_tile) * g.block_pitch + 8 * piece) = sums;
    }
  }
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_STRIDED_CELL_MATH_CUH_
