// FlashPrefill on CUDA: energies of blocks by their means, and the threshold alpha of a tile's largest energy.
#include <cmath>

#include "cuda/common/energies/plan.h"

namespace flashprefill::methods::flashprefill {
namespace {

cuda::EnergiesPlan PlanOf(const Problem& p, const Policy& policy, const cuda::Gpu& gpu) {
  const auto& f = reinterpret_cast<const fp_flashprefill&>(policy);
  cuda::EnergyScores scores;
  scores.keep.alpha_log2 = std::log2(f.alpha);
  scores.keep.min_blocks = f.min_blocks;
  scores.query_pool = f.query_pool;
  return cuda::EnergiesPlan::Of(p, policy, scores, gpu);
}

} // namespace

extern const cuda::Selector kCuda;
const cuda::Selector kCuda = cuda::SelectorOverScores<PlanOf>(cuda::EnergiesDenseUpToKeys);

} // namespace flashprefill::methods::flashprefill
