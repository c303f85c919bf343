// Selection without scores: Dense, Streaming, and any policy whose forced blocks are everything, which the host can
// tell from its bounds. Also the means of blocks alone, for an attend with mean correction. Plain C++.
#ifndef FLASHPREFILL_CUDA_COMMON_ENERGIES_FORCED_H_
#define FLASHPREFILL_CUDA_COMMON_ENERGIES_FORCED_H_

#include "cuda/common/sequence.cuh"
#include "cuda/selector.h"

namespace flashprefill::cuda {

class ForcedPlan {
 public:
  static ForcedPlan Of(const Problem& p, const Policy& policy, const Gpu& gpu);
  const char* Unsupported() const;
  void Take(Workspace& workspace, bool correction);
  cudaError_t Launch(const SelectTarget& target) const;

  Means means;

 private:
  DeviceProblem d_;
  TileRules rules_;
  bool corrects_; // the policy asks for the mean correction
};

// Whether the forced blocks are everything, whatever the lengths on the device are.
bool KeepsEverything(const Problem& p, const Policy& policy);

// A selector over the plan of a method that scores, and over ForcedPlan where there is nothing to score for.
template <auto PLAN_OF>
constexpr Selector SelectorOverScores(int (*dense_up_to_keys)(const Gpu&) = nullptr) {
  return {[](const Problem& p, const Policy& policy, const Gpu& gpu) {
            if (KeepsEverything(p, policy)) return ForcedPlan::Of(p, policy, gpu).Unsupported();
            return PLAN_OF(p, policy, gpu).Unsupported();
          },
          [](const Problem& p, const Policy& policy, const Gpu& gpu, bool correction, Workspace& workspace,
             const SelectTarget* target) {
            if (KeepsEverything(p, policy))
              return SelectBy(ForcedPlan::Of(p, policy, gpu), correction, workspace, target);
            return SelectBy(PLAN_OF(p, policy, gpu), correction, workspace, target);
          },
          dense_up_to_keys};
}

// Writes the forced blocks, and everything for sequences of at most rules.dense_up_to_keys keys.
cudaError_t LaunchForced(const DeviceProblem& d, const TileRules& rules, const SelectTarget& target);

// Room for means of blocks; several such arrays one after another.
void* TakeMeans(Workspace& workspace, const Problem& p, int block_size, int planes = 1);
Means TakeMeans(Workspace& workspace, const Problem& p, int block_size, bool k, bool v);

// Pools K, and V where `means` has room for it. A sequence that keeps everything is left out if `skip_forced`: no bit
// of it is zero, so attend does not correct either.
cudaError_t LaunchMeans(const DeviceProblem& d, const TileRules& rules, const Means& means, bool skip_forced,
                        cudaStream_t stream);

// The selector of methods without scores.
constexpr Selector ForcedSelector() {
  Selector selector = SelectorOver<ForcedPlan::Of>();
  selector.scores = false;
  selector.without_causal = true;
  return selector;
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ENERGIES_FORCED_H_
