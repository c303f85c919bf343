// The softmax of sampled rows by key block, for Hopper.
#include "cuda/common/sampled/score.cuh"
#include "cuda/sm90/panel_product.cuh"

namespace flashprefill::cuda {

cudaError_t LaunchSampledScoreSm90(const SampledShape& shape, cudaStream_t stream) {
  return LaunchSampledScoreWith<PanelProductSm90>(shape, stream);
}

} // namespace flashprefill::cuda
