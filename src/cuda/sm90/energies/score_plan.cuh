// Plan of the score kernel: the host's choices, shared memory, and the structs that warps exchange in it.
#ifndef FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_PLAN_CUH_
#define FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_PLAN_CUH_

#include <cuda.h>

#include "cuda/common/energies/units.cuh"
#include "cuda/common/ring.cuh"

namespace flashprefill::cuda {

constexpr int kScoreStages = 6;  // of keys at most
constexpr int kScoreBuffers = 8; // of queries at most

// Warpgroups of a kernel, and the registers that a thread of each has: math, one that starts copies, and those that
// pool query rows, where rows are made here (fewer than 128 columns). FlashPrefill's math is little compared to its
// loads, so loads get most threads, and math the registers for one product at a time. Sketch's math is more, and holds
// two products; those of 32 columns leave room for as many loads. With 128 columns there are registers for one, and
// four warpgroups to take turns. Together they have what the launch gave, and only math gets more than that.
template <int COLUMNS, bool SKETCH>
struct ScoreShape {
  static constexpr bool kTwoProducts = COLUMNS < 128 && SKETCH;
  static constexpr bool kHalfEnergies = kTwoProducts; // if need be; not where a team would have to agree on their base
  static constexpr int kMathGroups = COLUMNS < 128 ? 2 : 4;
  static constexpr bool kMuchMath = COLUMNS == 64 && SKETCH;
  static constexpr int kPoolGroups = COLUMNS == 128 ? 0 : kMuchMath ? 3 : 4, kPoolWarps = 4 * kPoolGroups;
  static constexpr int kGroups = kMathGroups + 1 + kPoolGroups, kThreads = 128 * kGroups;
  static constexpr int kAtLaunch = 65536 / kThreads / 8 * 8;
  static constexpr int kCopyRegisters = 24, kPoolRegisters = kMuchMath ? 64 : 72;
  static constexpr int kMathRegisters =
      (kAtLaunch * kGroups - kCopyRegisters - kPoolGroups * kPoolRegisters) / kMathGroups / 8 * 8;
};

// Arguments, with tensor maps of pooled rows or of q, and of key data.
struct ScoreParams : ScoreArgs {
  CUtensorMap q_map, k_map;
};

// The host's choices besides the arguments. With fewer than 128 columns a team is one warpgroup.
struct ScorePlan : UnitPlan {
  int panels;    // of 64 columns per row of q or k
  int q_panels;  // twice as many with squares
  int q_buffers; // each for a set; sets take them in turn
  int k_stages;
  int bin_warps; // that may look for a mass
};

struct ScoreControl {
  uint64_t q_full[kScoreBuffers], q_empty[kScoreBuffers], placed[kScoreBuffers];
  uint64_t k_full[kScoreStages], k_empty[kScoreStages];
  ScoreItem item[kScoreBuffers];
  UnitControl units;
};

struct ScoreLayout { // of dynamic shared memory, after the alignment to 1024
  int q_buffer, k_stage, k, energies, energies_set, bins, control, total;
};

__host__ __device__ inline ScoreLayout ScoreLayoutOf(const ScorePlan& plan, int columns) {
  ScoreLayout l;
  l.q_buffer = plan.q_panels * columns * kScorePanelBytes;
  l.k_stage = plan.panels * kStepBlocks * kScorePanelBytes;
  l.k = l.q_buffer * plan.q_buffers;
  l.energies = l.k + l.k_stage * plan.k_stages;
  l.energies_set = plan.units * plan.energy_stride * plan.energy_bytes;
  l.bins = (l.energies + l.energies_set * plan.sets + 15) / 16 * 16;
  l.control = l.bins + plan.bin_warps * kThresholdBins * 4;
  l.total = l.control + static_cast<int>(sizeof(ScoreControl));
  return l;
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_PLAN_CUH_
