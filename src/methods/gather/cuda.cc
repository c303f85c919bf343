// Gather on CUDA: keys are ranked for segments' mean queries (cuda/common/gather/plan.h), lists chosen by
// counting codes of energies (choose.cu).
#include "cuda/common/gather/plan.h"
#include "cuda/common/heuristics.h"
#include "methods/gather/segment.h"

namespace flashprefill::methods::gather {
namespace {

class Plan {
 public:
  static Plan Of(const Problem& p, const Policy& policy, const cuda::Gpu& gpu) {
    Plan plan;
    plan.policy_ = reinterpret_cast<const fp_gather&>(policy);
    plan.family_ = cuda::RankPlan::Of(p, policy, plan.policy_.segment, gpu);
    return plan;
  }

  const char* Unsupported() const { return family_.Unsupported(); }
  void Take(Workspace& workspace, bool) { family_.Take(workspace); } // means are for the mean correction alone

  cudaError_t Launch(const cuda::SelectTarget& target) const {
    return family_.Launch(target, [&](cuda::KeyChoiceArgs choice) {
      choice.gain = policy_.gain / static_cast<float>(kGainKeys); // NaN stays
      choice.budget = double{policy_.budget};
      return LaunchKeyChoice(choice, target.stream);
    });
  }

  cuda::Means means;

 private:
  fp_gather policy_;
  cuda::RankPlan family_;
};

} // namespace

extern const cuda::Selector kCuda;
const cuda::Selector kCuda = cuda::SelectorOverScores<Plan::Of>(cuda::EnergiesDenseUpToKeys);

} // namespace flashprefill::methods::gather
