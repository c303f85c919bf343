// Selection over strided cells, XAttention's and RRAttention's, from the host's side: shapes, scratch memory and
// launches. Plain C++. args.h has the shapes, docs/hopper-select.md the schedule.
#ifndef FLASHPREFILL_CUDA_COMMON_STRIDED_PLAN_H_
#define FLASHPREFILL_CUDA_COMMON_STRIDED_PLAN_H_

#include "cuda/common/energies/forced.h"
#include "cuda/common/strided/args.h"

namespace flashprefill::cuda {

// The parameters of a method of this family.
struct StridedScores {
  int stride;
  bool means;        // cells of keys are averaged and rows are single queries, else cells are taken whole
  bool forced_first; // forced blocks count towards the threshold
  float factor;      // of a product
  float threshold;   // share of a tile's sum to be kept
  const float* head_thresholds = nullptr; // one per query head in place of `threshold`, or null
};

class StridedPlan {
 public:
  static StridedPlan Of(const Problem& p, const Policy& policy, const StridedScores& scores, const Gpu& gpu);
  const char* Unsupported() const;
  void Take(Workspace& workspace, bool correction);
  // Three launches for each chunk of tiles.
  cudaError_t Launch(const SelectTarget& target) const;

  Means means;

 private:
  cudaError_t LaunchScores(const StridedScoreArgs& args, cudaStream_t stream) const;
  int64_t QueryRows() const { return shape_.q_tiles * d_.p.q_heads * shape_.rows_per_unit; }

  DeviceProblem d_;
  TileRules rules_;
  Gpu gpu_;
  StridedScores scores_;
  StridedShape shape_;
  int chunk_tiles_;
  // Scratch memory; null in a size query.
  void *k_cells_ = nullptr, *q_rows_ = nullptr, *sums_ = nullptr, *stats_ = nullptr;
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_STRIDED_PLAN_H_
