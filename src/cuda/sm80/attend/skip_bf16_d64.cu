// The portable attend kernel for masks that skip, bf16, head_dim up to 64.
#include "cuda/sm80/attend/skip.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_PORTABLE_SKIP(__nv_bfloat16, 64, false)

} // namespace flashprefill::cuda
