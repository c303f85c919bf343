// The CPU's row of a method: how much scratch memory its select needs, and select itself. A method with a cpu.cc
// defines `extern const cpu::Selector kCpu` there, most simply as cpu::SelectorBy<...>() (frame.h).
#ifndef FLASHPREFILL_CPU_SELECTOR_H_
#define FLASHPREFILL_CPU_SELECTOR_H_

#include <cstddef>

#include "core/types.h"

namespace flashprefill::cpu {

struct Selector {
  size_t (*workspace)(const Problem& problem, const Policy& policy, const Exec& exec);
  void (*select)(const Problem& problem, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace);
};

// Null: the method is not there on the CPU.
const Selector* SelectorOf(const Policy& policy);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_SELECTOR_H_
