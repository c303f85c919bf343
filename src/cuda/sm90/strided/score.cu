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
#include "cuda/common/grid_control.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/strided/cell_math.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/common/wgmma.cuh"
#include "cuda/sm90/strided/score_plan.cuh"

namespace flashprefill::cuda {
namespace {

// A math warpgroup's 64 rows.
template <typename T>
struct Scorer {
  const StridedScorePlan& plan;
  const CellMath& math;
  char* shared;
  StridedControl& c;
  int group, lane;
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

  __device__ void Run() {
    RingPosition items;
    float scores[kKeyTileCells / 2];
    for (;;) {
      BarrierWait(&c.item_full[items.stage], items.parity);
      const StridedItem& item = c.item[items.stage];
      if (item.end) return;
      Multiply(scores);
      math.Finish(scores, item.strip, item.key_tile);
      __syncwarp();
      if (lane == 0) BarrierArrive(&c.item_empty[items.stage]);
      items.Advance(kStridedItems);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kStridedThreads, 1)
    ScoreKernel(const __grid_constant__ StridedScoreParams args, const __grid_constant__ StridedScorePlan plan) {
  extern __shared__ char raw[];
  char* const shared = raw + (1024 - SharedAddress(raw) % 1024) % 1024;
  char* const staging = shared + plan.stages * kStridedStage;
  StridedControl& c = *reinterpret_cast<StridedControl*>(staging + kStridedWarps * kStridedWarpRows * plan.staging_row);
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
  GridRelease();
  GridWait(); // rows and cells are there, and the last chunk's sums have been read
  // Split up: one warp copies, two warpgroups multiply.
  if (warp >= 4 * kStridedGroups) {
    ShrinkRegisters<40>();
    if (warp == 4 * kStridedGroups) ProduceStrided(args, plan, shared, c);
  } else {
    GrowRegisters<232>();
    const int lane = static_cast<int>(threadIdx.x % 32);
    const CellMath math{args.common, plan, args.exponent_scale, staging + warp * kStridedWarpRows * plan.staging_row,
                        warp,        lane};
    Scorer<T> scorer{plan, math, shared, c, warp / 4, lane, {}};
    scorer.Run();
  }
}

cudaError_t MakeMaps(StridedScoreParams& args) {
  const Problem& p = args.common.d.p;
  const StridedShape& g = args.common.shape;
  const TensorMapShape keys{{g.columns, p.kv_heads * g.cell_rows, 1, 1}, {g.pitch, 0, 0}, kKeyTileCells, 1};
  if (cudaError_t e = MakeTensorMap(&args.k_map, args.common.k_cells, p.k.dtype, keys)) return e;
  const TensorMapShape rows{
      {g.columns, g.q_tiles * p.q_heads * g.rows_per_unit, 1, 1}, {g.pitch, 0, 0}, g.box_units * g.rows_per_unit, 1};
  if (cudaError_t e = MakeTensorMap(&args.q_map, args.common.q_rows, p.q.dtype, rows)) return e;
  auto in_place = [&](CUtensorMap* map, const Tensor& t, int cells, int heads, int64_t tokens, int box_heads) {
    const TensorMapShape shape{{p.head_dim, cells, heads, tokens - (cells - 1) * g.stride},
                               {g.stride * t.stride[1], t.stride[2], t.stride[1]},
                               cells,
                               box_heads};
    return MakeTensorMap(map, t.data, t.dtype, shape);
  };
  if (g.direct_q) {
    if (cudaError_t e = in_place(&args.q_direct_map, p.q, g.rows_per_unit, p.q_heads,
                                 (p.cu_seqlens_q ? p.total_q : p.batch * p.max_seqlen_q), g.box_units)) {
      return e;
    }
  }
  return g.direct_k ? in_place(&args.k_direct_map, p.k, kKeyTileCells, p.kv_heads,
                               (p.cu_seqlens_k ? p.total_k : p.batch * p.max_seqlen_k), 1)
                    : cudaSuccess;
}

} // namespace

cudaError_t LaunchStridedScoreSm90(const StridedScoreArgs& args, cudaStream_t stream) {
  const StridedShape& g = args.common.shape;
  const Problem& p = args.common.d.p;
  StridedScoreParams params{};
  static_cast<StridedScoreArgs&>(params) = args;
  if (cudaError_t e = MakeMaps(params)) return e;
  StridedScorePlan plan{StripPlan::Of(args.common), 0, Divider::Of(p.head_dim)};
  plan.stages = plan.whole_groups ? 4 : 3;
  int processors = 0;
  if (cudaError_t e = CountProcessors(&processors)) return e;
  const auto kernel = p.q.dtype == FP_BF16 ? ScoreKernel<__nv_bfloat16> : ScoreKernel<__half>;
  const int bytes =
      plan.stages * kStridedStage + plan.StagingBytes() + static_cast<int>(sizeof(StridedControl)) + kOperandAlign;
  if (cudaError_t e = AllowShared(kernel, bytes)) return e;
  const int64_t most = int64_t{plan.slots} * g.key_tiles * p.kv_heads;
  return LaunchOverlapped(kernel, true, std::min<int64_t>(processors, most), kStridedThreads, bytes, stream, params,
                          plan);
}

} // namespace flashprefill::cuda
