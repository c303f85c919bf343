// Dense on CUDA: every block, without scores.
#include "cuda/common/energies/forced.h"

namespace flashprefill::methods::dense {

extern const cuda::Selector kCuda;
const cuda::Selector kCuda = cuda::ForcedSelector();

} // namespace flashprefill::methods::dense
