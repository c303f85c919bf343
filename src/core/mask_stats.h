// What a mask in host memory keeps, by sequence and head.
#ifndef FLASHPREFILL_CORE_MASK_STATS_H_
#define FLASHPREFILL_CORE_MASK_STATS_H_

#include "core/types.h"

namespace flashprefill {

// Fills the arrays of stats that are not null: see fp_stats.
void CountKept(const Problem& problem, const BlockMask& mask, const Stats& stats);

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_MASK_STATS_H_
