// How CUDA selects, by method.
#include "cuda/selector.h"

namespace flashprefill {
#define DECL(name) namespace methods::name { extern const cuda::Selector kCuda; }
DECL(dense) DECL(streaming) DECL(flashprefill) DECL(sketch) DECL(xattention) DECL(rrattention) DECL(flexprefill) DECL(minference)
namespace cuda {
const Selector* SelectorOf(const Policy& policy) {
  switch (policy.kind) {
    case FP_DENSE: return &methods::dense::kCuda;
    case FP_STREAMING: return &methods::streaming::kCuda;
    case FP_FLASHPREFILL: return &methods::flashprefill::kCuda;
    case FP_SKETCH: return &methods::sketch::kCuda;
    case FP_XATTENTION: return &methods::xattention::kCuda;
    case FP_RRATTENTION: return &methods::rrattention::kCuda;
    case FP_FLEXPREFILL: return &methods::flexprefill::kCuda;
    case FP_MINFERENCE: return &methods::minference::kCuda;
    default: return nullptr;
  }
}
} // namespace cuda
} // namespace flashprefill
