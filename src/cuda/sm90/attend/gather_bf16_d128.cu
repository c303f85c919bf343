// The attend kernel for masks with key lists, bf16, head_dim up to 128.
#include "cuda/sm90/attend/attend.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_GATHER(__nv_bfloat16, 128)

} // namespace flashprefill::cuda
