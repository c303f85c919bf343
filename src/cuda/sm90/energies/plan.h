// Selection by energies, FlashPrefill's and Sketch's, from the host's side: every block of keys gets an energy, the sum
// of the exponentials of its scores against pooled query rows, and the energies decide. Two launches, pooling (pool.h)
// and scoring (score.h); nothing is read back. Plain C++.
#ifndef FLASHPREFILL_CUDA_SM90_ENERGIES_PLAN_H_
#define FLASHPREFILL_CUDA_SM90_ENERGIES_PLAN_H_

#include "cuda/sm90/energies/forced.h"
#include "cuda/sm90/energies/keep.h"

namespace flashprefill::cuda {

// In a prefill sequences of at most this many keys are attended to densely: on an H200, with 32 heads of 128, select
// and attend take 0.030 ms more than attend over the same density, and at 3072 keys dense attention takes 0.121 ms and
// the density of real text, about 0.8, saves no more than that.
constexpr int kEnergiesDenseUpToKeys = 3072;

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
  static EnergiesPlan Of(const Problem& p, const Policy& policy, const EnergyScores& scores);
  const char* Unsupported() const;
  void Take(Workspace& workspace, bool correction);
  cudaError_t Launch(const SelectTarget& target) const;

  Means means;

 private:
  cudaError_t LaunchScores(const SelectTarget& target, const TileRules& rules) const;
  int64_t UnitCount() const { return int64_t{d_.p.kv_heads} * rules_.units_per_kv * rules_.tile_rows; }

  DeviceProblem d_;
  TileRules rules_;
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

#endif // FLASHPREFILL_CUDA_SM90_ENERGIES_PLAN_H_
