// What the reference and the CPU share of Gather: what its gain and its budget count.
#ifndef FLASHPREFILL_METHODS_GATHER_SEGMENT_H_
#define FLASHPREFILL_METHODS_GATHER_SEGMENT_H_

#include <algorithm>
#include <cmath>

#include "core/segment.h"

namespace flashprefill::methods::gather {

constexpr double kGainKeys = 128; // gain speaks of so many keys, as Sketch's does of a block

// The number of keys that a budget asks for: rounded up, but not for what a float's 0.1 is above the number.
inline int64_t BudgetKeys(const fp_gather& policy, int64_t ranked) {
  const double keys = double{policy.budget} * static_cast<double>(ranked) * (1 - 1e-7);
  return std::min(ranked, static_cast<int64_t>(std::ceil(keys)));
}

} // namespace flashprefill::methods::gather

#endif // FLASHPREFILL_METHODS_GATHER_SEGMENT_H_
