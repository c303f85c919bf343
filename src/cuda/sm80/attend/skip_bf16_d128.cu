// The portable attend kernel for masks that skip, bf16, head_dim up to 128.
#include "cuda/sm80/attend/skip.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_PORTABLE_SKIP(__nv_bfloat16, 128, false)
FLASHPREFILL_INSTANTIATE_PORTABLE_SKIP(__nv_bfloat16, 128, true)

} // namespace flashprefill::cuda
