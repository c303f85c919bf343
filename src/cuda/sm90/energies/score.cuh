// Scores, energies, threshold and bitmap of FlashPrefill and Sketch, in one kernel: its idea and its frame.
// score_plan.cuh has its shared memory, score_load.cuh its loads, score_math.cuh its arithmetic.
//
// The product is made transposed: 64 key blocks are the rows of a wgmma, query rows its columns. A block's energy is
// the sum over a row, so it is added up inside a thread and between the four lanes that share the row, every energy
// belongs to exactly one warp, and no barrier stands in the main loop. Columns are the 128 rows of one unit (query_pool
// 1) or eight units of eight pooled rows, of four (32 columns), or 16 of two; a unit is one tile of one mask head
// (score.h).
//
// Exponentials need a common reference, and any will do: a warp keeps one for each of its units, the largest score of
// the first 16 blocks it sees. An energy is stored as its logarithm with the reference added back, so warps need not
// agree. Only where a sum gets too large, or is no number, the step is done again carefully: that sets a new reference
// and leaves out non-finite scores. So the loop has no maximum in it: a multiply-add, an exp2 and an add for each
// score, and a comparison more in the steps that the diagonal cuts.
//
// A CTA is persistent; items come heaviest first (PlaceScoreItem). Key data streams through a ring of 64-block stages
// that all math warpgroups read. With 128 columns there are four of these, each with the rows of one unit: while one
// waits, sets up or writes its mask, the others compute. With fewer there are two, and three or four warpgroups
// beside them that read raw rows of q, add them up and write the pooled rows where products read them, items ahead: the
// memory's work and the arithmetic run side by side, and pooled rows never go through memory. Energies of whole units
// stay in shared memory until keep.cuh turns them into bits, so nothing of size tiles x blocks x 4 bytes is ever in
// memory.
//
// A Sketch step is one plane of 64 blocks: mean with variance (the queries' squares against the variances, accumulated
// into the same product), then each outlier.
#ifndef FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_CUH_
#define FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_CUH_

#include "cuda/common/grid_control.cuh"
#include "cuda/sm90/energies/score_load.cuh"
#include "cuda/sm90/energies/score_math.cuh"

namespace flashprefill::cuda {

template <typename T, int PANELS, int COLUMNS, int ROWS, bool SKETCH>
__global__ void __launch_bounds__(ScoreShape<COLUMNS, SKETCH>::kThreads, 1)
    ScoreKernel(const __grid_constant__ ScoreParams a, const __grid_constant__ ScorePlan plan) {
  using Shape = ScoreShape<COLUMNS, SKETCH>;
  extern __shared__ char raw[];
  char* const shared = raw + (1024 - SharedAddress(raw) % 1024) % 1024;
  const ScoreLayout layout = ScoreLayoutOf(plan, COLUMNS);
  ScoreControl& c = *reinterpret_cast<ScoreControl*>(shared + layout.control);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0); // the compiler sees that a warp agrees

  // Set up barriers.
  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.q_buffers; ++i) {
      BarrierInit(&c.q_full[i], Shape::kPoolGroups ? 128 * Shape::kPoolGroups : 1);
      BarrierInit(&c.q_empty[i], 128 << plan.log2_team);
      BarrierInit(&c.placed[i], 1);
    }
    for (int i = 0; i < plan.k_stages; ++i) {
      BarrierInit(&c.k_full[i], 1);
      BarrierInit(&c.k_empty[i], 4 * plan.sets << plan.log2_team);
    }
    FenceBarrierInit();
    if (!Shape::kPoolGroups) PrefetchTensorMap(&a.q_map);
    PrefetchTensorMap(&a.k_map);
  }
  __syncthreads();
  GridRelease(); // attend may take its place as soon as there is room

  // Split up: products and energies, bulk copies, pooled rows.
  if (warp < 4 * Shape::kMathGroups) {
    GrowRegisters<Shape::kMathRegisters>();
    Scorer<T, PANELS, COLUMNS, ROWS, SKETCH> scorer(a, plan, layout, shared, c, warp);
    if (scorer.member < 1 << plan.log2_team) scorer.Run();
  } else if (warp < 4 * (Shape::kMathGroups + 1)) {
    ShrinkRegisters<Shape::kCopyRegisters>();
    if (threadIdx.x == 128 * Shape::kMathGroups) {
      GridWait(); // the pooling pass has written its results
      ProduceKeys(a, plan, layout, shared, c);
    } else if (threadIdx.x == 128 * Shape::kMathGroups + 32) {
      if (!Shape::kPoolGroups && !a.rows_in_q) GridWait();
      ProduceRows<(Shape::kPoolGroups > 0)>(a, plan, layout, shared, c, COLUMNS);
    }
  } else if constexpr (Shape::kPoolGroups > 0) {
    ShrinkRegisters<Shape::kPoolRegisters>();
    RowPooler<T, COLUMNS, ROWS, SKETCH>{a,      plan, layout,
                                        shared, c,    static_cast<int>(threadIdx.x) - 128 * (Shape::kMathGroups + 1)}
        .Run();
  }
}

using ScoreKernelPointer = void (*)(ScoreParams, ScorePlan);

// The kernels of a dtype, defined in a file for each.
template <typename T, bool SKETCH>
ScoreKernelPointer ScoreKernelOf(int panels, int unit_rows);

#define FLASHPREFILL_INSTANTIATE_SCORE(T, SKETCH)                                                                      \
  namespace {                                                                                                          \
  template <int PANELS>                                                                                                \
  ScoreKernelPointer WithPanels(int unit_rows) {                                                                       \
    if constexpr (SKETCH) {                                                                                            \
      if (unit_rows == 2) return ScoreKernel<T, PANELS, 32, 2, true>;                                                  \
      if (unit_rows == 4) return ScoreKernel<T, PANELS, 32, 4, true>;                                                  \
    }                                                                                                                  \
    return unit_rows == 8    ? ScoreKernel<T, PANELS, 64, 8, SKETCH>                                                   \
           : unit_rows == 32 ? ScoreKernel<T, PANELS, 64, 32, SKETCH>                                                  \
                             : ScoreKernel<T, PANELS, 128, 128, SKETCH>;                                               \
  }                                                                                                                    \
  }                                                                                                                    \
  template <>                                                                                                          \
  ScoreKernelPointer ScoreKernelOf<T, SKETCH>(int panels, int unit_rows) {                                             \
    return panels == 1 ? WithPanels<1>(unit_rows) : panels == 2 ? WithPanels<2>(unit_rows) : WithPanels<4>(unit_rows); \
  }

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_CUH_
