// Scores, energies, threshold and bitmap of FlashPrefill and Sketch, in one kernel: its idea, its frame and its launch.
// score_plan.cuh has its shared memory, score_load.cuh its loads, score_math.cuh its arithmetic.
//
// The product is made transposed: 64 key blocks are the rows of a wgmma, query rows its columns. A block's energy is
// the sum over a row, so it is added up inside a thread and between the four lanes that share the row, every energy
// belongs to exactly one warp, and no barrier stands in the main loop. Columns are the 128 rows of one unit (query_pool
// 1) or eight units of eight pooled rows; a unit is one tile of one mask head (score.h).
//
// Exponentials need a common reference, and any will do: a warp keeps one for each of its units, the largest score of
// the first 16 blocks it sees. An energy is stored as its logarithm with the reference added back, so warps need not
// agree. Only where a sum gets too large, or is no number, the step is done again carefully: that sets a new reference
// and leaves out non-finite scores. So the loop has no maximum in it: a multiply-add, an exp2 and an add for each
// score, and a comparison more in the steps that the diagonal cuts.
//
// A CTA is persistent; items come heaviest first (PlaceScoreItem). Key data streams through a ring of 64-block stages
// that all math warpgroups read. With 128 columns there are four of these, each with the rows of one unit: while one
// waits, sets up or writes its mask, the others compute. With 64 columns there are two, and three or four warpgroups
// beside them that read raw rows of q, add them up and write the pooled rows where products read them, items ahead: the
// memory's work and the arithmetic run side by side, and pooled rows never go through memory. Energies of whole units
// stay in shared memory until keep.cuh turns them into bits, so nothing of size tiles x blocks x 4 bytes is ever in
// memory.
//
// A Sketch step is one plane of 64 blocks: mean with variance (the queries' squares against the variances, accumulated
// into the same product), then each outlier.
#include "cuda/common/launch.h"
#include "cuda/sm90/energies/score_load.cuh"
#include "cuda/sm90/energies/score_math.cuh"

namespace flashprefill::cuda {
namespace {

template <typename T, int PANELS, int COLUMNS, int ROWS, bool SKETCH>
__global__ void __launch_bounds__(ScoreShape<COLUMNS, SKETCH>::kThreads, 1)
    ScoreKernel(const __grid_constant__ ScoreArgs a, const __grid_constant__ ScorePlan plan) {
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
  cudaTriggerProgrammaticLaunchCompletion(); // attend may take its place as soon as there is room

  // Split up: products and energies, bulk copies, pooled rows.
  if (warp < 4 * Shape::kMathGroups) {
    GrowRegisters<Shape::kMathRegisters>();
    const int group = warp / 4;
    Scorer<T, PANELS, COLUMNS, ROWS, SKETCH> scorer{a, plan,  layout,   shared,
                                                    c, group, warp % 4, static_cast<int>(threadIdx.x % 32)};
    scorer.set = group & (plan.sets - 1);
    scorer.member = group / plan.sets;
    scorer.energies = shared + layout.energies + scorer.set * layout.energies_set;
    if (scorer.member < 1 << plan.log2_team) scorer.Run();
  } else if (warp < 4 * (Shape::kMathGroups + 1)) {
    ShrinkRegisters<Shape::kCopyRegisters>();
    if (threadIdx.x == 128 * Shape::kMathGroups) {
      cudaGridDependencySynchronize(); // the pooling pass has written its results
      ProduceKeys(a, plan, layout, shared, c);
    } else if (threadIdx.x == 128 * Shape::kMathGroups + 32) {
      if (!Shape::kPoolGroups && !a.rows_in_q) cudaGridDependencySynchronize();
      ProduceRows<(Shape::kPoolGroups > 0)>(a, plan, layout, shared, c, COLUMNS);
    }
  } else if constexpr (Shape::kPoolGroups > 0) {
    ShrinkRegisters<Shape::kPoolRegisters>();
    RowPooler<T, COLUMNS, ROWS, SKETCH>{a,      plan, layout,
                                        shared, c,    static_cast<int>(threadIdx.x) - 128 * (Shape::kMathGroups + 1)}
        .Run();
  }
}

struct Groups {
  int math, threads;

  static Groups Of(int columns, bool sketch) {
    auto of = [](auto shape) { return Groups{shape.kMathGroups, shape.kThreads}; };
    if (columns == 128) return of(ScoreShape<128, false>());
    return sketch ? of(ScoreShape<64, true>()) : of(ScoreShape<64, false>());
  }
};

// The largest plan that fits in shared memory: as many units as can be, in as few sets as hold them, so that no column
// is idle. To fit, these go in this order: the fourth stage of keys, buffers of queries down to one a set
// (where two products are in flight: three for two sets), floats as energies and the other buffers there, the third
// stage of keys elsewhere, units.
bool PlanFor(int head_dim, int64_t max_blocks, int unit_rows, bool sketch, ScorePlan& plan) {
  const int columns = ScoreColumns(unit_rows);
  plan.panels = static_cast<int>(std::bit_ceil(static_cast<unsigned>(DivUp(head_dim, kScorePanelColumns))));
  plan.q_panels = plan.panels * (sketch ? 2 : 1);
  // 4 more than a multiple of 8: the two halves of Store's units then fall on different banks.
  const int64_t stride = DivUp<int64_t>(std::max<int64_t>(max_blocks, 1), kStepBlocks) * kStepBlocks + 4;
  if (stride > (1 << 20)) return false;
  plan.energy_stride = static_cast<int>(stride);
  plan.bin_warps = sketch ? 4 * Groups::Of(columns, sketch).math : 0;
  auto fits = [&](int q_buffers, int k_stages) {
    plan.q_buffers = q_buffers;
    plan.k_stages = k_stages;
    return ScoreLayoutOf(plan, columns).total + kOperandAlign <= kMaxSharedBytes;
  };
  // Of two products in flight the first has two stages of keys, which go back when the second has started.
  const bool two_products = sketch && columns == 64;
  const int most = Groups::Of(columns, sketch).math * columns / unit_rows;
  auto fits_with = [&](size_t energy_bytes, int least_buffers) {
    plan.energy_bytes = static_cast<int>(energy_bytes);
    for (int buffers = 2 * plan.sets; buffers >= least_buffers; --buffers) {
      if (fits(buffers, 4) || fits(buffers, 3)) return true;
    }
    return false;
  };
  for (int units = most; units >= 1; units /= 2) {
    plan.units = std::min(units, columns / unit_rows);
    plan.sets = units / plan.units;
    if (two_products) {
      if (fits_with(sizeof(float), plan.sets + 1) || fits_with(sizeof(__half), plan.sets)) return true;
    } else if (fits_with(sizeof(float), plan.sets) || fits(plan.sets, 2)) {
      return true;
    }
  }
  return false;
}

using Kernel = void (*)(ScoreArgs, ScorePlan);

template <typename T, bool SKETCH, int PANELS>
Kernel KernelWithPanels(int unit_rows) {
  return unit_rows == 8    ? ScoreKernel<T, PANELS, 64, 8, SKETCH>
         : unit_rows == 32 ? ScoreKernel<T, PANELS, 64, 32, SKETCH>
                           : ScoreKernel<T, PANELS, 128, 128, SKETCH>;
}

template <typename T, bool SKETCH>
Kernel KernelOf(int panels, int unit_rows) {
  return panels == 1   ? KernelWithPanels<T, SKETCH, 1>(unit_rows)
         : panels == 2 ? KernelWithPanels<T, SKETCH, 2>(unit_rows)
                       : KernelWithPanels<T, SKETCH, 4>(unit_rows);
}

template <typename T>
Kernel KernelOf(const ScorePlan& plan, int unit_rows, bool sketch) {
  return sketch ? KernelOf<T, true>(plan.panels, unit_rows) : KernelOf<T, false>(plan.panels, unit_rows);
}

} // namespace

int ScoreColumns(int unit_rows) { return unit_rows == 128 ? 128 : 64; }

const char* ScoreUnsupported(int head_dim, int64_t max_blocks, int unit_rows, bool sketch) {
  ScorePlan plan;
  if (PlanFor(head_dim, max_blocks, unit_rows, sketch, plan)) return nullptr;
  return "max_seqlen_k / block_size is too large for the energies of a tile to stay in shared memory: it must be "
         "smaller "
         "(or block_size larger) with this head_dim and query_pool";
}

cudaError_t LaunchScore(const ScoreArgs& args, cudaStream_t stream) {
  const Problem& p = args.d.p;
  ScorePlan plan;
  const int64_t max_blocks = DivUp<int64_t>(p.max_seqlen_k, args.rules.block_size);
  const int columns = ScoreColumns(args.unit_rows);
  const Groups groups = Groups::Of(columns, args.sketch);
  if (!PlanFor(p.head_dim, max_blocks, args.unit_rows, args.sketch, plan)) return cudaErrorInvalidValue;
  int processors = 0;
  if (cudaError_t e = CountProcessors(&processors)) return e;
  // Smaller items where there would not be one for each processor.
  const int64_t units = int64_t{args.rules.tile_rows} * args.rules.units_per_kv;
  while (plan.units > 1 && units * p.kv_heads < int64_t{processors} * plan.units * plan.sets) plan.units /= 2;
  while (columns == 128 && plan.sets > 1 && units * p.kv_heads < int64_t{processors} * plan.sets) plan.sets /= 2;
  plan.slots = static_cast<int>(units / (plan.units * plan.sets) + p.batch);
  plan.log2_units = std::countr_zero(static_cast<unsigned>(plan.units));
  plan.log2_team = columns == 64 ? 0 : std::countr_zero(static_cast<unsigned>(groups.math / plan.sets));
  plan.by_item = Divider::Of(plan.units * plan.sets);
  plan.by_chunks = Divider::Of(DivUp(p.head_dim, kColumns));
  plan.by_kv = Divider::Of(p.kv_heads);
  plan.by_heads = Divider::Of(args.rules.heads_per_tile);

  const Kernel kernel = p.q.dtype == FP_BF16 ? KernelOf<__nv_bfloat16>(plan, args.unit_rows, args.sketch)
                                             : KernelOf<__half>(plan, args.unit_rows, args.sketch);
  const int bytes = ScoreLayoutOf(plan, columns).total + kOperandAlign;
  if (cudaError_t e = AllowShared(kernel, bytes)) return e;
  return LaunchOverlapped(kernel, true, std::min<int64_t>(processors, int64_t{plan.slots} * p.kv_heads), groups.threads,
                          bytes, stream, args, plan);
}

} // namespace flashprefill::cuda
