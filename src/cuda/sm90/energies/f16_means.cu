// The score kernels for fp16, blocks described by their means.
#include "cuda/sm90/energies/score.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_SCORE(__half, false)

} // namespace flashprefill::cuda
