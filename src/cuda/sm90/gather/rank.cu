// Keys ranked for segments' mean queries, for Hopper.
#include "cuda/common/gather/rank.cuh"
#include "cuda/sm90/panel_product.cuh"

namespace flashprefill::cuda {

cudaError_t LaunchRankSumsSm90(const RankArgs& args, cudaStream_t stream) {
  return LaunchRankWith<PanelProductSm90>(args, true, stream);
}

cudaError_t LaunchRankCodesSm90(const RankArgs& args, cudaStream_t stream) {
  return LaunchRankWith<PanelProductSm90>(args, false, stream);
}

} // namespace flashprefill::cuda
