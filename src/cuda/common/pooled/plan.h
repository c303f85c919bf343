// Selection by pooled rows (Prism, SpargeAttn, MInference's block-sparse heads) from the host's side: the parts that
// they share. Means of query rows are multiplied with the means of key blocks (score.cuh), and the products decide
// (keep.cu), both in rounds of some panels of rows. Nothing is read back between the launches. Plain C++.
#ifndef FLASHPREFILL_CUDA_COMMON_POOLED_PLAN_H_
#define FLASHPREFILL_CUDA_COMMON_POOLED_PLAN_H_

#include "cuda/common/energies/forced.h"
#include "cuda/common/heuristics.h"
#include "cuda/common/pooled/args.h"

namespace flashprefill::cuda {

struct PooledPlan {
  Gpu gpu;
  PooledShape shape;
  int round_panels;

  Means means;

  // row_tokens: query rows per pooled row. bands: of dimensions, all of them unless the method sets others.
  static PooledPlan Of(const Problem& p, const Policy& policy, const Gpu& gpu, int row_tokens, int bands);
  const char* Unsupported() const;

  // Means of K, and with `correction` of V; pooled rows; logits.
  void Take(Workspace& workspace, bool correction);

  PooledKeepArgs Keep(const SelectTarget& target) const;
  // Pools K, and V where its means are wanted. k_floats: room for K's that are not rounded, or null.
  cudaError_t LaunchKeyMeans(float* k_floats, cudaStream_t stream) const;
  // Scores and keeps.
  cudaError_t LaunchRounds(PooledKeepArgs args, cudaStream_t stream) const;
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_POOLED_PLAN_H_
