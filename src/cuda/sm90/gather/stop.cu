// Lists that S2O's rows stop, for Hopper.
#include "cuda/common/gather/stop.cuh"
#include "cuda/sm90/panel_product.cuh"

namespace flashprefill::cuda {

cudaError_t LaunchKeyStopSm90(const KeyStopArgs& args, cudaStream_t stream) {
  return LaunchStopWith<PanelProductSm90>(args, stream);
}

} // namespace flashprefill::cuda
