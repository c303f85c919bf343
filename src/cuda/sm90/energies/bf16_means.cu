// The score kernels for bf16, blocks described by their means.
#include "cuda/sm90/energies/score.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_SCORE(__nv_bfloat16, false)

} // namespace flashprefill::cuda
