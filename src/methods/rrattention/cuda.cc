// RRAttention on CUDA: one query per cell, another one for each head, against the means of cells of keys.
#include "cuda/common/strided/plan.h"

namespace flashprefill::methods::rrattention {
namespace {

cuda::StridedPlan PlanOf(const Problem& p, const Policy& policy, const cuda::Gpu& gpu) {
  const auto& r = reinterpret_cast<const fp_rrattention&>(policy);
  cuda::StridedScores scores{};
  scores.stride = r.stride;
  scores.means = true;
  scores.forced_first = false;
  scores.factor = p.softmax_scale;
  scores.threshold = r.threshold;
  return cuda::StridedPlan::Of(p, policy, scores, gpu);
}

} // namespace

extern const cuda::Selector kCuda;
const cuda::Selector kCuda = cuda::SelectorOverScores<PlanOf>();

} // namespace flashprefill::methods::rrattention
