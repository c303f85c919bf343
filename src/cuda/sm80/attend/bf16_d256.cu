// The portable attend kernel for bf16, head_dim up to 256.
#include "cuda/sm80/attend/attend.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_PORTABLE_ATTEND(__nv_bfloat16, 256, false)
FLASHPREFILL_INSTANTIATE_PORTABLE_ATTEND(__nv_bfloat16, 256, true)

} // namespace flashprefill::cuda
