// From the energies or masses of a tile's blocks to its bits.
#ifndef FLASHPREFILL_CPU_TOP_P_H_
#define FLASHPREFILL_CPU_TOP_P_H_

#include <cstdint>
#include <limits>

namespace flashprefill::cpu {

// How energies decide: one of alpha, mass and gain, and NaN for the others.
struct KeepRule {
  float alpha = std::numeric_limits<float>::quiet_NaN();
  float mass = std::numeric_limits<float>::quiet_NaN();
  float gain = std::numeric_limits<float>::quiet_NaN();
  int min_blocks = 0;
};

// Sets the bits of the blocks among [0, scored) that the rule keeps by their energies; largest is the largest of them.
// keys: scratch memory of `scored` words.
void KeepByEnergy(const KeepRule& rule, const float* energies, int64_t scored, float largest, uint64_t* keys,
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

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_TOP_P_H_
