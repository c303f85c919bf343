// Prism on CUDA: the mean query of a tile times mean keys in two bands of dimensions, each with a temperature that
// follows from the squares of both.
#include "cuda/common/pooled/plan.h"
#include "methods/prism/rotary_bands.h"

namespace flashprefill::methods::prism {
namespace {

class Plan {
 public:
  static Plan Of(const Problem& p, const Policy& policy, const cuda::Gpu& gpu) {
    Plan plan;
    plan.policy_ = reinterpret_cast<const fp_prism&>(policy);
    plan.family_ = cuda::PooledPlan::Of(p, policy, gpu, kTileRows, 2);
    const RotaryBands bands = RotaryBands::Of(plan.policy_, p.head_dim);
    cuda::Bands& dims = plan.family_.shape.bands;
    dims = {2, {}};
    for (int d = 0; d < std::min(p.head_dim, cuda::kMaxPooledDim); ++d) {
      if (bands.InHigh(d)) dims.dims[0][d / 32] |= 1u << (d % 32);
      if (bands.InLow(d)) dims.dims[1][d / 32] |= 1u << (d % 32);
    }
    return plan;
  }

  const char* Unsupported() const { return family_.Unsupported(); }

  void Take(Workspace& workspace, bool correction) {
    family_.Take(workspace, correction);
    means = family_.means;
    squares_ = workspace.Take<cuda::BandSquares>(family_.shape.d.p.kv_heads * family_.shape.mean_rows);
  }

  cudaError_t Launch(const cuda::SelectTarget& target) const {
    cuda::PooledKeepArgs keep = family_.Keep(target);
    const cuda::PooledShape& shape = keep.shape;
    if (shape.d.p.max_seqlen_k <= shape.rules.dense_up_to_keys) return LaunchForced(shape.d, shape.rules, target);
    if (cudaError_t error = family_.LaunchKeyMeans(nullptr, target.stream)) return error;
    if (cudaError_t error = cuda::LaunchPooledRows(shape, target.stream)) return error;
    if (cudaError_t error = cuda::LaunchBandSquares(shape, squares_, target.stream)) return error;
    keep.rule = cuda::PooledRule::kLeastMass;
    keep.share = policy_.mass;
    keep.squares = squares_;
    return family_.LaunchRounds(keep, target.stream);
  }

  cuda::Means means;

 private:
  fp_prism policy_;
  cuda::PooledPlan family_;
  cuda::BandSquares* squares_ = nullptr; // scratch memory; null in a size query
};

} // namespace

extern const cuda::Selector kCuda;
const cuda::Selector kCuda = cuda::SelectorOverScores<Plan::Of>(cuda::EnergiesDenseUpToKeys);

} // namespace flashprefill::methods::prism
