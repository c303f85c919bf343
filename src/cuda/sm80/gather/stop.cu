// Lists that S2O's rows stop, for every NVIDIA GPU since Ampere.
#include "cuda/common/gather/stop.cuh"
#include "cuda/sm80/panel_product.cuh"

namespace flashprefill::cuda {

cudaError_t LaunchKeyStopPortable(const KeyStopArgs& args, cudaStream_t stream) {
  return LaunchStopWith<PanelProductPortable>(args, stream);
}

int64_t KeyStopBytesPortable(int head_dim, int64_t rows, int64_t room) {
  return StopBytesOf<PanelProductPortable>(head_dim, rows, room);
}

} // namespace flashprefill::cuda
