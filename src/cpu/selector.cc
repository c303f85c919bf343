// The table of selectors.
#include "cpu/selector.h"

namespace flashprefill {
namespace methods::dense {
extern const cpu::Selector kCpu;
}
namespace methods::streaming {
extern const cpu::Selector kCpu;
}
namespace methods::flashprefill {
extern const cpu::Selector kCpu;
}
namespace methods::sketch {
extern const cpu::Selector kCpu;
}
namespace methods::flexprefill {
extern const cpu::Selector kCpu;
}
namespace methods::minference {
extern const cpu::Selector kCpu;
}
namespace methods::xattention {
extern const cpu::Selector kCpu;
}
namespace methods::rrattention {
extern const cpu::Selector kCpu;
}
namespace methods::sparge_attn {
extern const cpu::Selector kCpu;
}
namespace methods::prism {
extern const cpu::Selector kCpu;
}
namespace methods::sample_attention {
extern const cpu::Selector kCpu;
}

namespace cpu {

const Selector* SelectorOf(const Policy& policy) {
  switch (policy.kind) {
    case FP_DENSE:
      return &methods::dense::kCpu;
    case FP_STREAMING:
      return &methods::streaming::kCpu;
    case FP_FLASHPREFILL:
      return &methods::flashprefill::kCpu;
    case FP_SKETCH:
      return &methods::sketch::kCpu;
    case FP_FLEXPREFILL:
      return &methods::flexprefill::kCpu;
    case FP_MINFERENCE:
      return &methods::minference::kCpu;
    case FP_XATTENTION:
      return &methods::xattention::kCpu;
    case FP_RRATTENTION:
      return &methods::rrattention::kCpu;
    case FP_SPARGE_ATTN:
      return &methods::sparge_attn::kCpu;
    case FP_PRISM:
      return &methods::prism::kCpu;
    case FP_SAMPLE_ATTENTION:
      return &methods::sample_attention::kCpu;
    default:
      return nullptr;
  }
}

} // namespace cpu
} // namespace flashprefill
