// The score kernel from the host's side: the choice of a plan, tensor maps, launch.
#include "cuda/common/launch.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sm90/energies/score.cuh"

namespace flashprefill::cuda {
namespace {

constexpr int kMaxSharedBytes = 227 * 1024; // of a CTA

struct Groups {
  int math, threads;

  static Groups Of(int columns, bool sketch) {
    auto of = [](auto shape) { return Groups{shape.kMathGroups, shape.kThreads}; };
    if (columns == 128) return of(ScoreShape<128, false>());
    if (columns == 32) return of(ScoreShape<32, true>());
    return sketch ? of(ScoreShape<64, true>()) : of(ScoreShape<64, false>());
  }
};

// The largest plan that fits in shared memory: as many units as can be, in as few sets as hold them, so that no column
// is idle. To fit, these go in this order: stages of keys from the fourth on (with 32 columns there may be six, their
// products are short), buffers of queries down to one a set
// (where two products are in flight: three for two sets), floats as energies and the other buffers there, the third
// stage of keys elsewhere, units.
//
// With 128 columns buffers go set by set, so that a buffer is one set's each time. Rows come by bulk copies there,
// which may end in another order than they began in, and an item without steps has none. Would a set's next buffer be
// another set's before, whose copy is still on its way when this set's own, later item is done, a wait for the parity
// after the next would pass at once, and that item be done twice. Pooled rows (fewer columns) are finished in order.
bool PlanFor(int head_dim, int64_t max_blocks, int unit_rows, bool sketch, ScorePlan& plan) {
  const int columns = ScoreColumns(unit_rows);
  plan.panels = static_cast<int>(std::bit_ceil(static_cast<unsigned>(DivUp(head_dim, kScorePanelColumns))));
  plan.q_panels = plan.panels * (sketch ? 2 : 1);
  const int64_t stride =
      DivUp<int64_t>(std::max<int64_t>(max_blocks, 1), kStepBlocks) * kStepBlocks + EnergyPad(unit_rows);
  if (stride > (1 << 20)) return false;
  plan.energy_stride = static_cast<int>(stride);
  plan.bin_warps = sketch ? 4 * Groups::Of(columns, sketch).math : 0;
  auto fits = [&](int q_buffers, int k_stages) {
    plan.q_buffers = q_buffers;
    plan.k_stages = k_stages;
    return ScoreLayoutOf(plan, columns).total + kOperandAlign <= kMaxSharedBytes;
  };
  // Of two products in flight the first has two stages of keys, which go back when the second has started.
  const bool two_products = sketch && columns < 128;
  const int most = Groups::Of(columns, sketch).math * columns / unit_rows;
  auto fits_with = [&](size_t energy_bytes, int least_buffers) {
    plan.energy_bytes = static_cast<int>(energy_bytes);
    for (int buffers = 2 * plan.sets; buffers >= least_buffers; buffers -= columns == 128 ? plan.sets : 1) {
      for (int stages = columns == 32 ? kScoreStages : 4; stages >= 3; --stages) {
        if (fits(buffers, stages)) return true;
      }
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

cudaError_t MakeMaps(ScoreParams& a) {
  const Problem& p = a.d.p;
  const int64_t planes = a.sketch ? 2 + a.outliers : 1;
  const TensorMapShape keys{{p.head_dim, planes * p.kv_heads * a.mean_rows, 1, 1}, {a.pitch, 0, 0}, kStepBlocks, 1};
  if (cudaError_t error = MakeTensorMap(&a.k_map, a.keys, p.k.dtype, keys)) return error;
  TensorMapShape rows{{p.head_dim, (a.sketch ? 2 : 1) * a.unit_count * a.unit_rows, 1, 1},
                      {a.pitch, 0, 0},
                      ScoreColumns(a.unit_rows),
                      1};
  if (a.rows_in_q) {
    rows.size[1] = p.q_heads;
    rows.size[2] = p.cu_seqlens_q ? p.total_q : p.max_seqlen_q;
    rows.size[3] = p.cu_seqlens_q ? 1 : p.batch;
    for (int i = 0; i < 3; ++i) rows.stride[i] = p.q.stride[2 - i];
    rows.box_heads = a.rules.heads_per_tile;
    rows.box_tokens = a.rules.tile_tokens;
  } else if (a.rows == nullptr) {
    return cudaSuccess; // rows are made in the kernel
  }
  return MakeTensorMap(&a.q_map, a.rows_in_q ? p.q.data : a.rows, p.q.dtype, rows);
}

} // namespace

bool ScoreFitsSm90(int head_dim, int64_t max_blocks, int unit_rows, bool sketch) {
  ScorePlan plan;
  return PlanFor(head_dim, max_blocks, unit_rows, sketch, plan);
}

cudaError_t LaunchScoreSm90(const ScoreArgs& args, cudaStream_t stream) {
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
  plan.log2_team = columns < 128 ? 0 : std::countr_zero(static_cast<unsigned>(groups.math / plan.sets));
  plan.SetDividers(p, args.rules);
  ScoreParams params{};
  static_cast<ScoreArgs&>(params) = args;
  if (cudaError_t e = MakeMaps(params)) return e;

  const bool bf16 = p.q.dtype == FP_BF16;
  const ScoreKernelPointer kernel = args.sketch
                                        ? (bf16 ? ScoreKernelOf<__nv_bfloat16, true>(plan.panels, args.unit_rows)
                                                : ScoreKernelOf<__half, true>(plan.panels, args.unit_rows))
                                        : (bf16 ? ScoreKernelOf<__nv_bfloat16, false>(plan.panels, args.unit_rows)
                                                : ScoreKernelOf<__half, false>(plan.panels, args.unit_rows));
  const int bytes = ScoreLayoutOf(plan, columns).total + kOperandAlign;
  if (cudaError_t e = AllowShared(kernel, bytes)) return e;
  return LaunchOverlapped(kernel, true, std::min<int64_t>(processors, int64_t{plan.slots} * p.kv_heads), groups.threads,
                          bytes, stream, params, plan);
}

} // namespace flashprefill::cuda
