// Selection by energies, FlashPrefill's and Sketch's, from the host's side: every block of keys gets an energy, the sum
// of the exponentials of its scores against pooled query rows, and the energies decide. Two launches, pooling (pool.h)
// and scoring (score.h); nothing is read back. Plain C++.
#ifndef FLASHPREFILL_CUDA_COMMON_ENERGIES_PLAN_H_
#define FLASHPREFILL_CUDA_COMMON_ENERGIES_PLAN_H_

#include "cuda/common/energies/forced.h"
#include "cuda/common/energies/keep.h"
#include "cuda/common/heuristics.h"

namespace flashprefill::cuda {

// The parameters of a method of this family.
struct EnergyScores {
  KeepRule keep;
  int query_pool = 1;        // rows of q per scored row
  bool sketch = false;       // blocks are described by mean, variance and outliers, else by their mean
  int outliers = 0;          // of a sketch
  bool query_metric = false; // distances of keys are weighted by the queries' squares
};

class EnergiesPlan {
 public:
  static EnergiesPlan Of(const Problem& p, const Policy& policy, const EnergyScores& scores, const Gpu& gpu);
  const char* Unsupported() const;
  void Take(Workspace& workspace, bool correction);
  cudaError_t Launch(const SelectTarget& target) const;

  Means means;

 private:
  cudaError_t LaunchScores(const SelectTarget& target, const TileRules& rules) const;
  int64_t UnitCount() const { return int64_t{d_.p.kv_heads} * rules_.units_per_kv * rules_.tile_rows; }

  DeviceProblem d_;
  TileRules rules_;
  Gpu gpu_;
  EnergyScores scores_;
  int rows_per_head_, unit_rows_;
  bool rows_in_q_;    // the score kernel multiplies rows of q as they lie there
  bool rows_pooled_;  // the pooling pass makes the rows; else the score kernel makes them itself
  bool rows_aligned_; // rows of q can be read 16 bytes at a time
  // Scratch memory; null where it is not needed, and in a size query.
  void *sketch_ = nullptr, *q_rows_ = nullptr;
  float* metric_ = nullptr;
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ENERGIES_PLAN_H_
