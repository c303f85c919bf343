// Sums of a head's last rows by key and by distance, for Hopper.
#include "cuda/common/vertical_slash/sums.cuh"
#include "cuda/sm90/panel_product.cuh"

namespace flashprefill::cuda {

cudaError_t LaunchSumsSm90(const SumsArgs& args, cudaStream_t stream) {
  return LaunchSumsWith<PanelProductSm90>(args, stream);
}

} // namespace flashprefill::cuda
