// Keys ranked for segments' mean queries, for every NVIDIA GPU since Ampere.
#include "cuda/common/gather/rank.cuh"
#include "cuda/sm80/panel_product.cuh"

namespace flashprefill::cuda {

cudaError_t LaunchRankSumsPortable(const RankArgs& args, cudaStream_t stream) {
  return LaunchRankWith<PanelProductPortable>(args, true, stream);
}

cudaError_t LaunchRankCodesPortable(const RankArgs& args, cudaStream_t stream) {
  return LaunchRankWith<PanelProductPortable>(args, false, stream);
}

} // namespace flashprefill::cuda
