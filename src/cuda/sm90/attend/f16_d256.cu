// The attend kernel for fp16, head_dim up to 256.
#include "cuda/sm90/attend/attend.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_ATTEND(__half, 256)

} // namespace flashprefill::cuda
