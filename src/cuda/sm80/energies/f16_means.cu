// The portable score kernels for fp16, blocks described by their means.
#include "cuda/sm80/energies/score.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_PORTABLE_SCORE(__half, false)

} // namespace flashprefill::cuda
