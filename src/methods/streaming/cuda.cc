// Streaming on CUDA: the forced blocks, without scores.
#include "cuda/common/energies/forced.h"

namespace flashprefill::methods::streaming {

extern const cuda::Selector kCuda;
const cuda::Selector kCuda = cuda::ForcedSelector();

} // namespace flashprefill::methods::streaming
