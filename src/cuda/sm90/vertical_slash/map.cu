// The map of a query-aware head, for Hopper.
#include "cuda/common/vertical_slash/map.cuh"
#include "cuda/sm90/panel_product.cuh"

namespace flashprefill::cuda {

cudaError_t LaunchMapSm90(const MapArgs& args, cudaStream_t stream) {
  return LaunchMapWith<PanelProductSm90>(args, stream);
}

} // namespace flashprefill::cuda
