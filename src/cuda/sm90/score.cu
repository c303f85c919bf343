// Scores, energies, threshold and bitmap of FlashPrefill and Sketch, in one kernel: its idea, its frame and its launch.
// score_plan.cuh has its shared memory and its producer, score_math.cuh its arithmetic.
//
// The product is made transposed: 64 key blocks are the rows of a wgmma, query rows its columns. A block's energy is
// the sum over a row, so it is added up inside a thread and between the four lanes that share the row, every energy
// belongs to exactly one warp, and no barrier stands in the main loop. Columns are the 128 rows of one unit (query_pool
// 1) or eight units of eight pooled rows; a unit is one tile of one mask head (score.h).
//
// Exponentials need a common reference, and any will do: a warp keeps one for each of its units, the largest score of
// the first 16 blocks it sees. An energy is stored as its logarithm with the reference added back, so warps need not
// agree. Only where a sum gets too large, or is no number, the step is done again carefully: that sets a new reference
// and leaves out what is not finite. The first step of a unit goes that way too, because its reference is -inf then.
// So the loop has no maximum in it: a multiply-add, an exp2 and an add for each score.
//
// A CTA has two math warpgroups with units of their own and a producer warp, and is persistent; items come heaviest
// first (PlaceScoreItem). Key data streams through a ring of 64-block stages that both warpgroups read; the next item's
// queries are loaded while this one is computed, if they fit. A warpgroup issues the product of step i+1 before the
// exponentials of step i, and the other one's run beside both. Energies of whole units stay in shared memory until
// keep.cuh turns them into bits, so nothing of size tiles x blocks x 4 bytes is ever in memory.
//
// A Sketch step is one plane of 64 blocks: mean with variance (the queries' squares against the variances, accumulated
// into the same product), then each outlier.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/sm90/score_math.cuh"

namespace flashprefill::cuda {
namespace {

constexpr int kSharedBytes = 227 * 1024;

template <typename T, int PANELS, int COLUMNS, int ROWS, bool SKETCH>
__global__ void __launch_bounds__(kScoreThreads, 1)
    ScoreKernel(const __grid_constant__ ScoreArgs a, const __grid_constant__ ScorePlan plan) {
  extern __shared__ char raw[];
  char* const shared = raw + (1024 - SharedAddress(raw) % 1024) % 1024;
  const ScoreLayout layout = ScoreLayoutOf(plan, COLUMNS);
  ScoreControl& c = *reinterpret_cast<ScoreControl*>(shared + layout.control);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0); // the compiler sees that a warp agrees

  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.q_stages; ++i) {
      BarrierInit(&c.q_full[i], 1);
      BarrierInit(&c.q_empty[i], 4 * kScoreGroups); // an arrival a warp
    }
    for (int i = 0; i < plan.k_stages; ++i) {
      BarrierInit(&c.k_full[i], 1);
      BarrierInit(&c.k_empty[i], 4 * kScoreGroups);
    }
    FenceBarrierInit();
    PrefetchTensorMap(&a.q_map);
    PrefetchTensorMap(&a.k_map);
  }
  __syncthreads();
  cudaTriggerProgrammaticLaunchCompletion(); // attend may take its place as soon as there is room
  cudaGridDependencySynchronize();           // what the pooling pass wrote

  if (warp >= 4 * kScoreGroups) {
    ShrinkRegisters<24>();
    if (threadIdx.x == 128 * kScoreGroups) ProduceScores(a, plan, layout, shared, c, COLUMNS);
  } else {
    GrowRegisters<240>();
    const int group = warp / 4;
    Scorer<T, PANELS, COLUMNS, ROWS, SKETCH> scorer{a, plan,  layout,   shared,
                                                    c, group, warp % 4, static_cast<int>(threadIdx.x % 32)};
    scorer.energies =
        reinterpret_cast<float*>(shared + layout.energies + (group < plan.groups ? group : 0) * layout.energies_group);
    scorer.Run();
  }
}

// The largest plan that fits in shared memory. What does not fit goes in this order: the fourth stage of keys (a step
// of Sketch needs three), the second stage of queries, units, the second warpgroup.
bool PlanFor(int head_dim, int64_t max_blocks, int unit_rows, bool sketch, ScorePlan& plan) {
  const int columns = ScoreColumns(unit_rows);
  plan.panels = static_cast<int>(std::bit_ceil(static_cast<unsigned>(DivUp(head_dim, kScorePanelColumns))));
  plan.q_panels = plan.panels * (sketch ? 2 : 1);
  // 4 more than a multiple of 8: the two halves of Store's units then fall on different banks.
  const int64_t stride = DivUp<int64_t>(std::max<int64_t>(max_blocks, 1), kStepBlocks) * kStepBlocks + 4;
  if (stride > (1 << 20)) return false;
  plan.energy_stride = static_cast<int>(stride);
  for (plan.groups = kScoreGroups; plan.groups >= 1; --plan.groups) {
    for (plan.units = columns / unit_rows; plan.units >= 1; plan.units /= 2) {
      for (plan.q_stages = 2; plan.q_stages >= 1; --plan.q_stages) {
        for (plan.k_stages = 4; plan.k_stages >= 3; --plan.k_stages) {
          if (ScoreLayoutOf(plan, columns).total + 1024 <= kSharedBytes) return true;
        }
      }
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
  if (!PlanFor(p.head_dim, max_blocks, args.unit_rows, args.sketch, plan)) return cudaErrorInvalidValue;
  int device = 0, processors = 0;
  if (cudaError_t e = cudaGetDevice(&device)) return e;
  if (cudaError_t e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return e;
  // Smaller items where there would not be one for each processor.
  const int64_t units = int64_t{args.rules.tile_rows} * args.rules.units_a_kv;
  while (plan.units > 1 && units * p.kv_heads < int64_t{processors} * plan.units * plan.groups) plan.units /= 2;
  plan.slots = static_cast<int>(units / (plan.units * plan.groups) + p.batch);
  plan.log2_units = std::countr_zero(static_cast<unsigned>(plan.units));
  plan.by_item = Divider::Of(plan.units * plan.groups);
  plan.by_kv = Divider::Of(p.kv_heads);
  plan.by_heads = Divider::Of(args.rules.heads_a_tile);

  const Kernel kernel = p.q.dtype == FP_BF16 ? KernelOf<__nv_bfloat16>(plan, args.unit_rows, args.sketch)
                                             : KernelOf<__half>(plan, args.unit_rows, args.sketch);
  const int bytes = ScoreLayoutOf(plan, ScoreColumns(args.unit_rows)).total + 1024;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return e;

  cudaLaunchAttribute overlap{}; // this kernel may start while the pooling pass ends; it waits for it itself
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(processors, int64_t{plan.slots} * p.kv_heads)));
  config.blockDim = dim3(kScoreThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args, plan);
}

} // namespace flashprefill::cuda
