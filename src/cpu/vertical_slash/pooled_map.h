// A head's map of pooled softmax, and the choice of its largest entries.
#ifndef FLASHPREFILL_CPU_VERTICAL_SLASH_POOLED_MAP_H_
#define FLASHPREFILL_CPU_VERTICAL_SLASH_POOLED_MAP_H_

#include "cpu/vertical_slash/vertical_slash.h"

namespace flashprefill::cpu {

// Row r of the map is the softmax of the mean query of block r over the mean keys of all blocks that it sees. Sets the
// bits of the largest entries of the whole map that hold this share of it, equal ones by row, then by block, in all
// tiles that their block of queries overlaps. Needs key_means.
void KeepByPooledMap(const HeadCall& call, float share);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_VERTICAL_SLASH_POOLED_MAP_H_
