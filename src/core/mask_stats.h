// What a mask in host memory keeps, by sequence and head.
#ifndef FLASHPREFILL_CORE_MASK_STATS_H_
#define FLASHPREFILL_CORE_MASK_STATS_H_

#include "core/types.h"

namespace flashprefill {

// Blocks that tile m of a mask head keeps, keys that are finer than blocks included: what counts say.
int64_t KeptBlocks(const Problem& p, const Geometry& g, const BlockMask& mask, const Sequence& s, int64_t head,
                   int64_t m);

// Fills the arrays of stats that are not null: see fp_stats.
void CountKept(const Problem& problem, const BlockMask& mask, const Stats& stats);

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_MASK_STATS_H_
