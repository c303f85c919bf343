// Sums of a head's last rows by key and by distance, for every GPU since Ampere.
#include "cuda/common/vertical_slash/sums.cuh"
#include "cuda/sm80/panel_product.cuh"

namespace flashprefill::cuda {

cudaError_t LaunchSumsPortable(const SumsArgs& args, cudaStream_t stream) {
  return LaunchSumsWith<PanelProductPortable>(args, stream);
}

} // namespace flashprefill::cuda
