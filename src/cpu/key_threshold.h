// Which of a list's keys to keep by their energies, without sorting them: a histogram of eighths of an octave says
// which bins are in for sure, and only the keys of the few bins at the threshold are put in order. Keys then come out
// ascending in one pass. Energies order as their bits do, and equal ones by index.
#ifndef FLASHPREFILL_CPU_KEY_THRESHOLD_H_
#define FLASHPREFILL_CPU_KEY_THRESHOLD_H_

#include <cstdint>
#include <limits>

namespace flashprefill::cpu {

// By gain: the best key first, while energy * sqrt(rest) >= gain, where rest is the sum of the energies from this one
// on. Else the best `count`. Never more than `room`.
struct KeyRule {
  double gain = std::numeric_limits<double>::quiet_NaN();
  double below = 0; // the sum of the energies of keys that are out already: all are less than those that are left
  int64_t count = 0;
  int64_t room = 0;
};

// A key is kept if its rank is at least `least`. A rank is the bits of the energy, and below them the complement of its
// place among the energies.
struct KeyThreshold {
  uint64_t least = ~uint64_t{0};
  int64_t kept = 0;
  int64_t wanted = 0; // if there were room
};

// energies: n of them, finite and not negative, of keys in ascending order. ranks: scratch memory, [n].
KeyThreshold FindKeyThreshold(const float* energies, int64_t n, const KeyRule& rule, uint64_t* ranks);

// Writes keys[i], or i where keys is null, for every energies[i] that is kept, ascending: threshold.kept numbers.
void TakeKeys(const float* energies, const int32_t* keys, int64_t n, const KeyThreshold& threshold, int32_t* taken);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_KEY_THRESHOLD_H_
