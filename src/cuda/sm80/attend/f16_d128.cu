// The portable attend kernel for fp16, head_dim up to 128.
#include "cuda/sm80/attend/attend.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_PORTABLE_ATTEND(__half, 128, false)
FLASHPREFILL_INSTANTIATE_PORTABLE_ATTEND(__half, 128, true)

} // namespace flashprefill::cuda
