// The portable score kernel from the host's side: the choice of a plan, and its launch.
#include "cuda/common/launch.h"
#include "cuda/sm80/energies/score.cuh"

namespace flashprefill::cuda {
namespace {

// The largest plan that fits in a CTA's `shared` bytes. To fit, these go in this order: the third stage, floats as
// energies, the second set and then the second group, units.
bool PlanFor(int shared, int head_dim, int64_t max_blocks, int unit_rows, bool sketch, bool whole,
             PortableScorePlan& plan) {
  const int columns = ScoreColumns(unit_rows);
  plan.panels = static_cast<int>(std::bit_ceil(static_cast<unsigned>(DivUp(head_dim, kScorePanelColumns))));
  plan.q_panels = plan.panels * (sketch ? 2 : 1);
  // 4 more than a multiple of 8: the two halves of Store's units then fall on different banks.
  const int64_t stride = DivUp<int64_t>(std::max<int64_t>(max_blocks, 1), kStepBlocks) * kStepBlocks + 4;
  if (stride > (1 << 20)) return false;
  plan.energy_stride = static_cast<int>(stride);
  plan.streams = false;
  constexpr int kSetsAndTeams[3][2] = {{2, 0}, {1, 1}, {1, 0}}; // sets, log2 of groups per set
  for (int units = columns / unit_rows; units >= 1; units /= 2) {
    plan.units = units;
    for (const auto& [sets, log2_team] : kSetsAndTeams) {
      plan.sets = sets;
      plan.log2_team = log2_team;
      plan.groups = sets << log2_team;
      for (int energy_bytes = 4; energy_bytes >= (columns == 64 ? 2 : 4); energy_bytes -= 2) {
        plan.energy_bytes = energy_bytes;
        for (int stages = 3; stages >= 2; --stages) {
          plan.stages = stages;
          if (PortableScoreLayoutOf(plan, columns, sketch).total <= shared) return true;
        }
      }
      if (whole) return false; // with two sets of all units, or not at all
    }
  }
  // Sketch's rows of head_dim 256 and query_pool 1 are 128 KiB. They come with the stages then.
  plan.streams = columns == 128;
  plan.energy_bytes = 4;
  return plan.streams && PortableScoreLayoutOf(plan, columns, sketch).total <= shared;
}

// Two CTAs per multiprocessor, if that costs nothing else.
bool PlanFor(const Gpu& gpu, int head_dim, int64_t max_blocks, int unit_rows, bool sketch, PortableScorePlan& plan) {
  const int half = std::min(gpu.shared_bytes, gpu.shared_of_processor / 2 - 1024);
  if (PlanFor(half, head_dim, max_blocks, unit_rows, sketch, true, plan) && plan.energy_bytes == 4) return true;
  return PlanFor(gpu.shared_bytes, head_dim, max_blocks, unit_rows, sketch, false, plan);
}

} // namespace

bool ScoreFitsPortable(const Gpu& gpu, int head_dim, int64_t max_blocks, int unit_rows, bool sketch) {
  PortableScorePlan plan{};
  return PlanFor(gpu, head_dim, max_blocks, unit_rows, sketch, plan);
}

cudaError_t LaunchScorePortable(const ScoreArgs& args, const Gpu& gpu, cudaStream_t stream) {
  const Problem& p = args.d.p;
  PortableScorePlan plan{};
  const int64_t max_blocks = DivUp<int64_t>(p.max_seqlen_k, args.rules.block_size);
  if (!PlanFor(gpu, p.head_dim, max_blocks, args.unit_rows, args.sketch, plan)) return cudaErrorInvalidValue;
  int processors = 0;
  if (cudaError_t e = CountProcessors(&processors)) return e;
  const int columns = ScoreColumns(args.unit_rows);
  const int bytes = PortableScoreLayoutOf(plan, columns, args.sketch).total;
  const int64_t places = int64_t{processors} * (gpu.Holds(2, bytes) ? 2 : 1);
  // Smaller items where there would not be one for each place.
  const int64_t units = int64_t{args.rules.tile_rows} * args.rules.units_per_kv * p.kv_heads;
  while (plan.units > 1 && units < places * plan.units * plan.sets) plan.units /= 2;
  plan.SetDividers(p, args.rules);

  const bool bf16 = p.q.dtype == FP_BF16;
  const auto kernel = args.sketch ? (bf16 ? PortableScoreKernelOf<__nv_bfloat16, true>(plan.panels, args.unit_rows)
                                          : PortableScoreKernelOf<__half, true>(plan.panels, args.unit_rows))
                                  : (bf16 ? PortableScoreKernelOf<__nv_bfloat16, false>(plan.panels, args.unit_rows)
                                          : PortableScoreKernelOf<__half, false>(plan.panels, args.unit_rows));
  if (cudaError_t e = AllowSharedOnly(kernel, bytes)) return e;
  return LaunchOverlapped(kernel, true, std::min<int64_t>(places, int64_t{plan.slots} * p.kv_heads), 128 * plan.groups,
                          bytes, stream, args, static_cast<const PortableScorePlan&>(plan));
}

} // namespace flashprefill::cuda
