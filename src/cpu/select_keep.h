// From a tile's energies to its bits.
#ifndef FLASHPREFILL_CPU_SELECT_KEEP_H_
#define FLASHPREFILL_CPU_SELECT_KEEP_H_

#include "core/types.h"
#include "cpu/select_plan.h"

namespace flashprefill::cpu {

// Sets the bits of the blocks among [0, scored) that the policy keeps by their energies; largest is the largest of
// them. keys: scratch memory of `scored` words.
void KeepByEnergy(const SelectPlan& plan, const float* energies, int64_t scored, float largest, uint64_t* keys,
                  uint64_t* row);

// Sets the bits of more blocks among [0, n), by descending mass, until those that are set hold this share of all mass:
// the block that crosses it is set too. keys: scratch memory of n words.
void TopP(const float* mass, int64_t n, float share, uint64_t* keys, uint64_t* row);

// An energy of a block that the next two leave out of their ranking.
constexpr float kUnranked = -1;

// Sets the bits of the top blocks whose energies sum up to at most this share of all, and of the first one anyway.
void TopPExclusive(const float* energies, int64_t n, float share, uint64_t* keys, uint64_t* row);

// Sets the bits of the top `count` blocks.
void TopK(const float* energies, int64_t n, int64_t count, uint64_t* keys, uint64_t* row);

// Sets the bits of forced blocks.
void KeepForced(const Policy& policy, const Tile& tile, uint64_t* row);

int32_t CountBits(const uint64_t* row, int64_t words);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_SELECT_KEEP_H_
