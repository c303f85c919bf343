// The portable score kernels for bf16, blocks described by their means.
#include "cuda/sm80/energies/score.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_PORTABLE_SCORE(__nv_bfloat16, false)

} // namespace flashprefill::cuda
