// XAttention on CUDA: whole cells of `stride` tokens, summed over antidiagonals by the product of a cell's queries,
// last to first, with a cell's keys.
#include "cuda/common/strided/plan.h"

namespace flashprefill::methods::xattention {
namespace {

cuda::StridedPlan PlanOf(const Problem& p, const Policy& policy, const cuda::Gpu& gpu) {
  const auto& x = reinterpret_cast<const fp_xattention&>(policy);
  cuda::StridedScores scores{};
  scores.stride = x.stride;
  scores.means = false;
  scores.forced_first = true;
  scores.factor = p.softmax_scale / (static_cast<float>(x.stride) * x.norm);
  scores.threshold = x.threshold;
  scores.head_thresholds = x.head_count > 0 ? x.head_thresholds : nullptr;
  return cuda::StridedPlan::Of(p, policy, scores, gpu);
}

constexpr cuda::Selector Make() {
  cuda::Selector selector = cuda::SelectorOverScores<PlanOf>();
  selector.without_causal = true;
  return selector;
}

} // namespace

extern const cuda::Selector kCuda;
const cuda::Selector kCuda = Make();

} // namespace flashprefill::methods::xattention
