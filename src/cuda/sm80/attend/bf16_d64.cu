// The portable attend kernel for bf16, head_dim up to 64.
#include "cuda/sm80/attend/attend.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_PORTABLE_ATTEND(__nv_bfloat16, 64, false)

} // namespace flashprefill::cuda
