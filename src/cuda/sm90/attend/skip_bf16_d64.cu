// The attend kernel for masks that skip, bf16, head_dim up to 64.
#include "cuda/sm90/attend/skip.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_SKIP(__nv_bfloat16, 64)

} // namespace flashprefill::cuda
