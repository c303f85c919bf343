// The score kernels for bf16, Sketch.
#include "cuda/sm90/energies/score.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_SCORE(__nv_bfloat16, true)

} // namespace flashprefill::cuda
