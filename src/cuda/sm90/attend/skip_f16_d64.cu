// The attend kernel for masks that skip, fp16, head_dim up to 64.
#include "cuda/sm90/attend/skip.cuh"

namespace flashprefill::cuda {

FLASHPREFILL_INSTANTIATE_SKIP(__half, 64)

} // namespace flashprefill::cuda
