// The CPU's attend. attend.cc divides the work, tile.cc walks one tile's mask, kernels.h names the
// arithmetic that each instruction set brings. docs/cpu-kernel.md explains the schedule.
#ifndef FLASHPREFILL_CPU_ATTEND_ATTEND_H_
#define FLASHPREFILL_CPU_ATTEND_ATTEND_H_

#include <cstddef>

#include "core/types.h"

namespace flashprefill::cpu {

size_t AttendWorkspace(const Problem& problem, const BlockMask& mask, const Exec& exec);
void Attend(const Problem& problem, const BlockMask& mask, const Exec& exec, const Output& output, void* workspace);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_ATTEND_ATTEND_H_
