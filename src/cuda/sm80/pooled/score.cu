// Products of pooled rows with mean keys, for every GPU since Ampere.
#include "cuda/common/pooled/score.cuh"
#include "cuda/sm80/panel_product.cuh"

namespace flashprefill::cuda {

cudaError_t LaunchPooledScorePortable(const PooledShape& shape, cudaStream_t stream) {
  return LaunchPooledScoreWith<PanelProductPortable>(shape, stream);
}

} // namespace flashprefill::cuda
