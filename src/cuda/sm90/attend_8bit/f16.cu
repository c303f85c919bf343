// The 8-bit attend kernel for fp16 queries.
#include "cuda/sm90/attend_8bit/kernel.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_ATTEND_8BIT(__half)

} // namespace flashprefill::cuda
