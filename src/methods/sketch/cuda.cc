// Sketch on CUDA: energies of blocks by mean, variance and outliers, and one of three ways to decide.
#include <cmath>

#include "cuda/common/energies/plan.h"

namespace flashprefill::methods::sketch {
namespace {

cuda::EnergiesPlan PlanOf(const Problem& p, const Policy& policy, const cuda::Gpu& gpu) {
  const auto& f = reinterpret_cast<const fp_sketch&>(policy);
  cuda::EnergyScores scores;
  scores.keep.by_mass = !std::isnan(f.mass);
  scores.keep.mass = f.mass;
  scores.keep.alpha_log2 = std::log2(f.alpha);
  scores.keep.gain = std::isnan(f.gain) ? 0 : f.gain;
  scores.keep.min_blocks = f.min_blocks;
  scores.query_pool = f.query_pool;
  scores.sketch = true;
  scores.outliers = f.outliers;
  scores.query_metric = f.query_metric != 0;
  return cuda::EnergiesPlan::Of(p, policy, scores, gpu);
}

} // namespace

extern const cuda::Selector kCuda;
const cuda::Selector kCuda = cuda::SelectorOverScores<PlanOf>(cuda::EnergiesDenseUpToKeys);

} // namespace flashprefill::methods::sketch
