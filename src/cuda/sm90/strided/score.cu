// Scores of strips of rows against key tiles of cells, and their powers of two. Kept of them are, for each row and key
// tile, the largest exponent and the sum, and for each row and block the sum relative to it. A row's softmax needs its
// sum over all keys, which no CTA sees; with these, keep.cu makes shares of a whole row without a second product.
//
// Fast, because it is a textbook matrix product: 128 rows times 256 cells over columns of stride * head_dim, 32 steps
// of 64 columns at stride 16 and head_dim 128. Two math warpgroups have 64 rows each and read the same cells; a
// producer warp keeps a ring of stages full. The work after a product comes once every 32 steps: a twentieth of the
// time.
//
// Strips and key tiles that causality leaves are numbered by every producer for itself, in groups of 32 strips of one
// KV head, key tile after key tile, and CTA c takes the numbers c, c + CTAs, ... So all CTAs get the same number of
// equal pieces whatever the lengths are, no counter is in memory, and neighbours in time share strips and cells in L2.
#include "cuda/common/launch.h"
#include "cuda/common/wgmma.cuh"
#include "cuda/sm90/strided/score_plan.cuh"

namespace flashprefill::cuda {
namespace {

// The larger one; no number if one of them is none.
__device__ __forceinline__ float MaxOrNan(float a, float b) {
  float x;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
}

// A math warpgroup's 64 rows.
template <typename T>
struct Scorer {
  const StridedScoreArgs& args;
  const StridedScorePlan& plan;
  char* shared;
  StridedControl& c;
  char* staging; // of this warp
  int group, warp, lane;
  RingPosition ring;

  __device__ __forceinline__ void Release(int stage) const {
    __syncwarp(); // all lanes are through their own wait for the stage
    if (lane == 0) BarrierArrive(&c.empty[stage]);
  }

  // scores = 64 rows times 256 cells.
  __device__ __forceinline__ void Multiply(float (&scores)[kKeyTileCells / 2]) {
    int before = 0;
    for (int step = 0; step < plan.steps; ++step) {
      const uint32_t stage = SharedAddress(shared + ring.stage * kStridedStage);
      const uint64_t rows = DescribeKMajor(stage + group * 64 * kStridedRowBytes),
                     cells = DescribeKMajor(stage + kStridedRowsStage);
      BarrierWait(&c.full[ring.stage], ring.parity);
      WgmmaFence();
#pragma unroll
      for (int slice = 0; slice < 4; ++slice) { // 16 columns: 32 bytes; addresses count in units of 16
        Wgmma<T>::SS(scores, rows + slice * 2, cells + slice * 2, step + slice > 0);
      }
      WgmmaCommit();
      if (step > 0) {
        WgmmaWait<1>();
        Release(before);
      }
      before = ring.stage;
      ring.Advance(plan.stages);
    }
    WgmmaWait<0>();
    Release(before);
    KeepInPlace(scores);
  }

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
      base[half] = RowMax(part) * args.exponent_scale;
    }
    if (__any_sync(~0u, !(fabsf(base[0]) < INFINITY) || !(fabsf(base[1]) < INFINITY))) return false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float part[4] = {};
#pragma unroll
      for (int i = 0; i < kKeyTileCells / 4; ++i) {
        float& z = scores[4 * (i / 2) + 2 * half + i % 2];
        z = Exp2(fmaf(z, args.exponent_scale, -base[half]));
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
        z *= args.exponent_scale;
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
    const StridedShape& g = args.common.shape;
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

  __device__ __forceinline__ void Finish(float (&scores)[kKeyTileCells / 2], const StridedItem& item) const {
    const StridedArgs& a = args.common;
    const StridedShape& g = a.shape;
    const TileRules& r = a.rules;
    const StridedStrip& strip = item.strip;
    const int first_dense = FirstDenseTile(r, strip.sequence);
    const int units = r.units_per_kv, first_row = 64 * group + kStridedWarpRows * warp;
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
          in_warp < live_rows ? RowLimit(g, strip.sequence, tile, in_strip & (g.rows_per_unit - 1), head) : 0;
      seen[half] = min(limit - item.key_tile * g.key_tile_cells, g.key_tile_cells);
    }
    // Make powers of two, and keep the largest exponent and the sum of each row.
    float2 stats[2];
    const bool whole = __all_sync(~0u, min(seen[0], seen[1]) == kKeyTileCells);
    if (!(whole && Exponentials(scores, stats))) CarefulExponentials(scores, seen, stats);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int in_warp = lane / 4 + 8 * half;
      if (lane % 4 == 0 && in_warp < live_rows) a.stats[(row + in_warp) * g.key_tiles + item.key_tile] = stats[half];
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
      *reinterpret_cast<uint4*>(a.sums + ((row + in_warp) * g.key_tiles + item.key_tile) * g.block_pitch + 8 * piece) =
          sums;
    }
  }

  __device__ void Run() {
    RingPosition items;
    float scores[kKeyTileCells / 2];
    for (;;) {
      BarrierWait(&c.item_full[items.stage], items.parity);
      const StridedItem& item = c.item[items.stage];
      if (item.end) return;
      Multiply(scores);
      Finish(scores, item);
      __syncwarp();
      if (lane == 0) BarrierArrive(&c.item_empty[items.stage]);
      items.Advance(kStridedItems);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kStridedThreads, 1)
    ScoreKernel(const __grid_constant__ StridedScoreArgs args, const __grid_constant__ StridedScorePlan plan) {
  extern __shared__ char raw[];
  char* const shared = raw + (1024 - SharedAddress(raw) % 1024) % 1024;
  char* const staging = shared + plan.stages * kStridedStage;
  StridedControl& c = *reinterpret_cast<StridedControl*>(staging + StridedStagingBytes(plan));
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0); // the compiler sees that a warp agrees

  // Set up barriers.
  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.stages; ++i) {
      BarrierInit(&c.full[i], 1);
      BarrierInit(&c.empty[i], 4 * kStridedGroups); // an arrival per warp
    }
    for (int i = 0; i < kStridedItems; ++i) {
      BarrierInit(&c.item_full[i], 1);
      BarrierInit(&c.item_empty[i], 4 * kStridedGroups);
    }
    FenceBarrierInit();
    PrefetchTensorMap(&args.k_map);
    PrefetchTensorMap(&args.q_map);
    if (args.common.shape.direct_q) PrefetchTensorMap(&args.q_direct_map);
    if (args.common.shape.direct_k) PrefetchTensorMap(&args.k_direct_map);
  }
  __syncthreads();
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize(); // rows and cells are there, and the last chunk's sums have been read
  // Split up: one warp copies, two warpgroups multiply.
  if (warp >= 4 * kStridedGroups) {
    ShrinkRegisters<40>();
    if (warp == 4 * kStridedGroups) ProduceStrided(args, plan, shared, c);
  } else {
    GrowRegisters<232>();
    Scorer<T> scorer{args,
                     plan,
                     shared,
                     c,
                     staging + warp * kStridedWarpRows * plan.staging_row,
                     warp / 4,
                     warp % 4,
                     static_cast<int>(threadIdx.x % 32),
                     {}};
    scorer.Run();
  }
}

} // namespace

cudaError_t LaunchStridedScore(const StridedScoreArgs& args, cudaStream_t stream) {
  const StridedArgs& a = args.common;
  const StridedShape& g = a.shape;
  const Problem& p = a.d.p;
  StridedScorePlan plan{};
  plan.steps = DivUp(g.columns, kStridedPanel);
  plan.whole_groups = g.cells_per_block % 8 == 0;
  plan.stages = plan.whole_groups ? 4 : 3;
  // 16 bytes more than the row: then eight rows begin on different banks.
  plan.staging_row = (plan.whole_groups ? g.block_pitch : kKeyTileCells) * 2 + 16;
  plan.slots = static_cast<int>((int64_t{a.tiles} * a.rules.units_per_kv) / g.stride + p.batch);
  plan.by_groups = Divider::Of(DivUp(plan.slots, kStridedGroupStrips));
  plan.by_columns = Divider::Of(p.head_dim);
  int processors = 0;
  if (cudaError_t e = CountProcessors(&processors)) return e;
  const auto kernel = p.q.dtype == FP_BF16 ? ScoreKernel<__nv_bfloat16> : ScoreKernel<__half>;
  const int bytes = plan.stages * kStridedStage + StridedStagingBytes(plan) + static_cast<int>(sizeof(StridedControl)) +
                    kOperandAlign;
  if (cudaError_t e = AllowShared(kernel, bytes)) return e;
  const int64_t most = int64_t{plan.slots} * g.key_tiles * p.kv_heads;
  return LaunchOverlapped(kernel, true, std::min<int64_t>(processors, most), kStridedThreads, bytes, stream, args,
                          plan);
}

} // namespace flashprefill::cuda
