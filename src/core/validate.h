// Checks of all arguments (Rule 7), before any work. Each throws Error with one line: the argument as the header names
// it, its value and what it must be.
#ifndef FLASHPREFILL_CORE_VALIDATE_H_
#define FLASHPREFILL_CORE_VALIDATE_H_

#include "core/types.h"

namespace flashprefill {

struct Method;

void ValidateProblem(const Problem* problem);
const Method* ValidatePolicyAlone(const Policy* policy); // its fields; returns its method
void ValidatePolicy(const Policy* policy, const Problem& problem);
void ValidateMask(const BlockMask* mask, const Problem& problem, bool needs_bits = true);
void ValidateVerticalSlash(const BlockMask& mask,
                           const Problem& problem);                   // what a mask to be attended to has written there
void ValidateKeyLists(const BlockMask& mask, const Problem& problem); // the same
void ValidateMaskOf(const BlockMask& mask, const Policy& policy,
                    const Problem& problem); // that it is a mask that this policy makes
void ValidateOutput(const Output* output, const Problem& problem);
void ValidateExec(const Exec* exec);
void ValidateGuard(const fp_guard* guard, const Problem& problem);
void ValidateWorkspace(const void* workspace, size_t bytes, size_t needed);

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_VALIDATE_H_
