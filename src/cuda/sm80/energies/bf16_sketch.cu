// The portable score kernels for bf16, Sketch.
#include "cuda/sm80/energies/score.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_PORTABLE_SCORE(__nv_bfloat16, true)

} // namespace flashprefill::cuda
