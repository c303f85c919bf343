// Plan of the portable score kernel: the host's choices and shared memory.
#ifndef FLASHPREFILL_CUDA_SM80_ENERGIES_SCORE_PLAN_CUH_
#define FLASHPREFILL_CUDA_SM80_ENERGIES_SCORE_PLAN_CUH_

#include "cuda/common/energies/units.cuh"

namespace flashprefill::cuda {

constexpr int kPortableScoreGroups = 2; // of four warps
constexpr int kPortableScoreThreads = 128 * kPortableScoreGroups;

// Sets and groups: two sets with a group each; where their rows don't fit, one set whose team are both groups; else one
// group alone. A stage is one panel of 64 columns of the 64 key blocks that each member of a team takes in a step.
struct PortableScorePlan : UnitPlan {
  int panels;   // of 64 columns per row of q or k
  int q_panels; // twice as many with squares
  int groups;   // that run
  int stages;   // 2 or 3
  bool streams; // rows come with each stage, where they don't fit into shared memory whole

  __host__ __device__ int Team() const { return 1 << log2_team; }
  __host__ __device__ int StageRows() const { return kStepBlocks * Team(); }
};

struct PortableScoreControl {
  ScoreItem item;
  UnitControl units;
};

struct PortableScoreLayout { // of dynamic shared memory: rows of all sets first
  int rows_set, stage, stages, energies, energies_set, bins, control, total;
};

__host__ __device__ inline PortableScoreLayout PortableScoreLayoutOf(const PortableScorePlan& plan, int columns,
                                                                     bool sketch) {
  PortableScoreLayout l;
  l.rows_set = plan.streams ? 0 : plan.q_panels * columns * kScorePanelBytes;
  l.stage = (plan.StageRows() + (plan.streams ? columns : 0)) * kScorePanelBytes;
  l.stages = l.rows_set * plan.sets;
  l.energies = l.stages + l.stage * plan.stages;
  l.energies_set = plan.units * plan.energy_stride * plan.energy_bytes;
  l.bins = (l.energies + l.energies_set * plan.sets + 15) / 16 * 16;
  l.control = l.bins + (sketch ? 4 * plan.groups * kThresholdBins * 4 : 0);
  l.total = l.control + static_cast<int>(sizeof(PortableScoreControl));
  return l;
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM80_ENERGIES_SCORE_PLAN_CUH_
