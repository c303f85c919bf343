// Policies that choose for a whole head at once, by a few of its query rows: FlexPrefill and MInference.
// select_lines.cc divides the work, lines.h says what a policy can ask for, flexprefill.cc and minference.cc are the
// policies.
#ifndef FLASHPREFILL_CPU_SELECT_LINES_H_
#define FLASHPREFILL_CPU_SELECT_LINES_H_

#include <cstddef>

#include "core/types.h"

namespace flashprefill::cpu {

inline bool ChoosesByHead(const Policy& policy) {
  return policy.kind == FP_FLEXPREFILL || policy.kind == FP_MINFERENCE;
}

size_t SelectLinesWorkspace(const Problem& problem, const Policy& policy, const Exec& exec);
void SelectLines(const Problem& problem, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_SELECT_LINES_H_
