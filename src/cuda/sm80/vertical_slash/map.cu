// The map of a query-aware head, for every GPU since Ampere.
#include "cuda/common/vertical_slash/map.cuh"
#include "cuda/sm80/panel_product.cuh"

namespace flashprefill::cuda {

cudaError_t LaunchMapPortable(const MapArgs& args, cudaStream_t stream) {
  return LaunchMapWith<PanelProductPortable>(args, stream);
}

} // namespace flashprefill::cuda
