// Products of pooled rows with mean keys, for Hopper.
#include "cuda/common/pooled/score.cuh"
#include "cuda/sm90/panel_product.cuh"

namespace flashprefill::cuda {

cudaError_t LaunchPooledScoreSm90(const PooledShape& shape, cudaStream_t stream) {
  return LaunchPooledScoreWith<PanelProductSm90>(shape, stream);
}

} // namespace flashprefill::cuda
