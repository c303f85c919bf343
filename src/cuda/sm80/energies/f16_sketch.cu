// The portable score kernels for fp16, Sketch.
#include "cuda/sm80/energies/score.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_PORTABLE_SCORE(__half, true)

} // namespace flashprefill::cuda
