// The softmax of sampled rows by key block, for every GPU since Ampere.
#include "cuda/common/sampled/score.cuh"
#include "cuda/sm80/panel_product.cuh"

namespace flashprefill::cuda {

cudaError_t LaunchSampledScorePortable(const SampledShape& shape, cudaStream_t stream) {
  return LaunchSampledScoreWith<PanelProductPortable>(shape, stream);
}

} // namespace flashprefill::cuda
