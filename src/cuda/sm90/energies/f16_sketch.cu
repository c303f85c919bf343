// The score kernels for fp16, Sketch.
#include "cuda/sm90/energies/score.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_SCORE(__half, true)

} // namespace flashprefill::cuda
