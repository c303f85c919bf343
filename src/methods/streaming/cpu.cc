// Streaming on the CPU: nothing is scored, the frame does all.
#include "cpu/frame.h"

namespace flashprefill::methods::streaming {

extern const cpu::Selector kCpu = cpu::SelectorBy<cpu::ForcedBlocks>();

} // namespace flashprefill::methods::streaming
