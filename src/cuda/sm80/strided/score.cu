// Scores of strips of rows against key tiles of cells, for every GPU since Ampere: a plain product of the two matrices
// that gather.cu has made, 128 rows times 256 cells over columns of stride * head_dim, and then the powers of two of
// common/strided/cell_math.cuh. Eight warps have 16 rows each, and all load.
#include "cuda/common/grid_control.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/strided/cell_math.cuh"
#include "cuda/sm80/mma.cuh"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 32 * kStridedWarps;
constexpr int kMostStages = 4;

struct PortablePlan : StripPlan {
  int stages; // 2, 3 or 4; the sums on their way out lie where they were
};

template <typename T>
struct Scorer {
  const StridedScoreArgs& args;
  const PortablePlan& plan;
  const CellMath& math;
  uint32_t stages; // in shared memory
  int warp;

  // Starts the copies of a step's 64 columns. Always a group of copies, also an empty one.
  __device__ __forceinline__ void LoadStep(int64_t first_row, int rows, int64_t first_cell, int cells, int step,
                                           int slot) const {
    const StridedShape& g = args.common.shape;
    if (step < plan.steps) {
      const int piece = threadIdx.x % 8, column = step * kStridedPanel + piece * 8;
      const int bytes = 2 * min(max(g.columns - column, 0), 8); // the pitch may be more
      const uint32_t to = stages + slot * kStridedStage;
      const auto copy = [&](uint32_t panel, const void* matrix, int64_t first, int count, int row) {
        const bool there = bytes > 0 && row < count;
        const T* const from = static_cast<const T*>(matrix) + (there ? (first + row) * g.pitch + column : 0);
        AsyncCopyPart16(panel + row * kRowBytes + ((piece ^ row % 8) << 4), from, there ? bytes : 0);
      };
#pragma unroll
      for (int i = 0; i < kStripRows / (kThreads / 8); ++i) {
        copy(to, args.common.q_rows, first_row, rows, threadIdx.x / 8 + i * (kThreads / 8));
      }
#pragma unroll
      for (int i = 0; i < kKeyTileCells / (kThreads / 8); ++i) {
        copy(to + kStridedRowsStage, args.common.k_cells, first_cell, cells, threadIdx.x / 8 + i * (kThreads / 8));
      }
    }
    AsyncCopyCommit();
  }

  __device__ __forceinline__ void Wait() const {
    if (plan.stages == 4) {
      AsyncCopyWait<2>();
    } else if (plan.stages == 3) {
      AsyncCopyWait<1>();
    } else {
      AsyncCopyWait<0>();
    }
    __syncthreads();
  }

  __device__ __forceinline__ void Piece(const StridedStrip& strip, int key_tile) const {
    const StridedArgs& a = args.common;
    const StridedShape& g = a.shape;
    const Problem& p = a.d.p;
    const int units = a.rules.units_per_kv;
    const int64_t first_row = ((int64_t{strip.kv} * g.q_tiles + strip.local_tile) * units + strip.unit) << g.log2_rows;
    const int64_t in_head = MeanBase(p, strip.sequence, g.stride) + int64_t{key_tile} * g.key_tile_cells;
    const int rows = strip.units << g.log2_rows;
    const int cells = static_cast<int>(min(int64_t{kKeyTileCells}, g.cell_rows - in_head));
    const int64_t first_cell = strip.kv * g.cell_rows + in_head;
    const auto load = [&](int step, int slot) { LoadStep(first_row, rows, first_cell, cells, step, slot); };

    float scores[kKeyTileCells / 2];
#pragma unroll
    for (float& s : scores) s = 0;
    for (int i = 0; i < plan.stages - 1; ++i) load(i, i);
    int slot = 0, next = plan.stages - 1;
#pragma unroll 1
    for (int step = 0; step < plan.steps; ++step) {
      Wait();
      load(step + plan.stages - 1, next);
      const uint32_t stage = stages + slot * kStridedStage;
      const uint32_t left = RowsOfA(stage, warp * kStridedWarpRows), right = RowsOfB(stage + kStridedRowsStage, 0);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t row[4];
        LoadMatrix4(row, cuda::Piece(left, k));
#pragma unroll
        for (int n = 0; n < kKeyTileCells / 16; ++n) {
          uint32_t cell[4];
          LoadMatrix4(cell, cuda::Piece(right, k) + n * 16 * kRowBytes);
          Mma<T>(scores + 8 * n, row, cell[0], cell[1]);
          Mma<T>(scores + 8 * n + 4, row, cell[2], cell[3]);
        }
      }
      next = slot;
      slot = slot + 1 == plan.stages ? 0 : slot + 1;
    }
    AsyncCopyWait<0>();
    __syncthreads(); // the stages are free: sums go there
    math.Finish(scores, strip, key_tile);
    __syncthreads();
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    ScoreKernel(const __grid_constant__ StridedScoreArgs args, const __grid_constant__ PortablePlan plan) {
  extern __shared__ __align__(128) char shared[];
  __shared__ StridedStrip strips[kStridedGroupStrips];
  GridRelease();
  GridWait(); // rows and cells are there, and the last chunk's sums have been read
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = static_cast<int>(threadIdx.x % 32);
  const CellMath math{args.common, plan, args.exponent_scale, shared + warp * kStridedWarpRows * plan.staging_row,
                      warp,        lane};
  const Scorer<T> scorer{args, plan, math, SharedAddress(shared), warp};
  ForPieces(
      args.common, plan, strips, warp == 0, [] { __syncthreads(); },
      [&](const StridedStrip& strip, int key_tile) { scorer.Piece(strip, key_tile); });
}

} // namespace

cudaError_t LaunchStridedScorePortable(const StridedScoreArgs& args, const Gpu& gpu, cudaStream_t stream) {
  const Problem& p = args.common.d.p;
  PortablePlan plan{StripPlan::Of(args.common), 0};
  const int room = gpu.shared_bytes - static_cast<int>(sizeof(StridedStrip)) * kStridedGroupStrips;
  plan.stages = std::min(kMostStages, room / kStridedStage);
  int processors = 0;
  if (cudaError_t e = CountProcessors(&processors)) return e;
  const auto kernel = p.q.dtype == FP_BF16 ? ScoreKernel<__nv_bfloat16> : ScoreKernel<__half>;
  const int bytes = std::max(plan.stages * kStridedStage, plan.StagingBytes());
  if (cudaError_t e = AllowSharedOnly(kernel, bytes)) return e;
  const int64_t most = int64_t{plan.slots} * args.common.shape.key_tiles * p.kv_heads;
  return LaunchOverlapped(kernel, true, std::min<int64_t>(processors, most), kThreads, bytes, stream, args, plan);
}

} // namespace flashprefill::cuda
