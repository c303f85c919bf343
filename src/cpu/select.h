// The CPU's select: from a policy and Q and K to the bits of a block mask. select.cc divides the work, select_plan.h
// says how scratch memory is laid out, select_kernels.cc holds the arithmetic for each instruction set and
// select_keep.cc turns energies into bits.
#ifndef FLASHPREFILL_CPU_SELECT_H_
#define FLASHPREFILL_CPU_SELECT_H_

#include <cstddef>

#include "core/types.h"

namespace flashprefill::cpu {

size_t SelectWorkspace(const Problem& problem, const Policy& policy, const Exec& exec);
void Select(const Problem& problem, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_SELECT_H_
