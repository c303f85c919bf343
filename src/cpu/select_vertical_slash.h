// Policies that choose for a whole head at once, by a few of its query rows: FlexPrefill and MInference.
// select_vertical_slash.cc divides the work, vertical_slash.h says what a policy can ask for, flexprefill.cc and
// minference.cc are the policies.
#ifndef FLASHPREFILL_CPU_SELECT_VERTICAL_SLASH_H_
#define FLASHPREFILL_CPU_SELECT_VERTICAL_SLASH_H_

#include <cstddef>

#include "core/types.h"

namespace flashprefill::cpu {

bool ChoosesByHead(const Policy& policy);

size_t SelectVerticalSlashWorkspace(const Problem& problem, const Policy& policy, const Exec& exec);
void SelectVerticalSlash(const Problem& problem, const Policy& policy, const Exec& exec, BlockMask& mask,
                         void* workspace);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_SELECT_VERTICAL_SLASH_H_
