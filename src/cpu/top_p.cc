// A threshold relative to the largest energy needs one comparison per block and no order among them. mass, gain and
// min_blocks do need one: energies are not negative, so their bits order as integers do, and one integer of (energy,
// block from behind) sorts by energy first and by the lower block among equals. Blocks are at most some thousands, and
// sorting them is cheap compared to the products that made them.
#include "cpu/top_p.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

#include "core/types.h"

namespace flashprefill::cpu {
namespace {

uint64_t Key(float energy, int64_t block) {
  return uint64_t{std::bit_cast<uint32_t>(energy)} << 32 | (~static_cast<uint32_t>(block));
}
int64_t BlockOf(uint64_t key) { return static_cast<uint32_t>(~key); }
double EnergyOf(uint64_t key) { return std::bit_cast<float>(static_cast<uint32_t>(key >> 32)); }

// Fills keys with the blocks that are ranked, largest energy first.
int64_t Rank(const float* energies, int64_t n, uint64_t* keys) {
  int64_t ranked = 0;
  for (int64_t b = 0; b < n; ++b) {
    if (energies[b] >= 0) keys[ranked++] = Key(energies[b], b);
  }
  std::sort(keys, keys + ranked, std::greater<>());
  return ranked;
}

} // namespace

void KeepByEnergy(const KeepRule& rule, const float* energies, int64_t scored, float largest, uint64_t* keys,
                  uint64_t* row) {
  const bool ordered = std::isnan(rule.alpha); // by mass or gain
  const int64_t least = std::min<int64_t>(rule.min_blocks, scored);
  if (!ordered) {
    const float threshold = rule.alpha * largest;
    for (int64_t begin = 0; begin < scored; begin += 64) {
      const int64_t end = std::min(begin + 64, scored);
      uint64_t word = 0;
      for (int64_t b = begin; b < end; ++b) word |= uint64_t{energies[b] >= threshold} << (b - begin);
      row[begin / 64] |= word;
    }
  }
  if (!ordered && least == 0) return;

  for (int64_t b = 0; b < scored; ++b) keys[b] = Key(energies[b], b);
  if (!ordered) {
    std::nth_element(keys, keys + (least - 1), keys + scored, std::greater<>());
    for (int64_t i = 0; i < least; ++i) SetBit(row, BlockOf(keys[i]));
    return;
  }
  std::sort(keys, keys + scored, std::greater<>());
  double total = 0; // in the order of the sum below, so that a mass of 1 is reached exactly
  for (int64_t i = 0; i < scored; ++i) total += EnergyOf(keys[i]);
  if (!std::isnan(rule.gain)) {
    double rest = total;
    const auto worth = [&](double energy) {
      return energy / total * std::sqrt(std::max(0.0, rest / total)) >= double{rule.gain};
    };
    for (int64_t i = 0; i < scored && (i < least || worth(EnergyOf(keys[i]))); ++i) {
      SetBit(row, BlockOf(keys[i]));
      rest -= EnergyOf(keys[i]);
    }
    return;
  }
  const double share = rule.mass * total;
  double sum = 0;
  for (int64_t i = 0; i < scored && (i == 0 || i < least || sum < share); ++i) {
    SetBit(row, BlockOf(keys[i]));
    sum += EnergyOf(keys[i]);
  }
}

void TopP(const float* mass, int64_t n, float share, uint64_t* keys, uint64_t* row) {
  double sum = 0;
  int64_t ranked = 0;
  for (int64_t b = 0; b < n; ++b) {
    if (TestBit(row, b)) {
      sum += mass[b];
    } else {
      keys[ranked++] = Key(mass[b], b);
    }
  }
  std::sort(keys, keys + ranked, std::greater<>());
  double total = sum;
  for (int64_t i = 0; i < ranked; ++i) total += EnergyOf(keys[i]);
  // A share of 1 is everything, also blocks whose mass underflowed to 0.
  const double enough = share < 1 ? share * total : std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < ranked && sum < enough; ++i) {
    SetBit(row, BlockOf(keys[i]));
    sum += EnergyOf(keys[i]);
  }
}

void TopPExclusive(const float* energies, int64_t n, float share, uint64_t* keys, uint64_t* row) {
  const int64_t ranked = Rank(energies, n, keys);
  double total = 0, sum = 0;
  for (int64_t i = 0; i < ranked; ++i) total += EnergyOf(keys[i]);
  for (int64_t i = 0; i < ranked; ++i) {
    sum += EnergyOf(keys[i]);
    if (i > 0 && sum > share * total) break;
    SetBit(row, BlockOf(keys[i]));
  }
}

void TopK(const float* energies, int64_t n, int64_t count, uint64_t* keys, uint64_t* row) {
  const int64_t ranked = Rank(energies, n, keys);
  for (int64_t i = 0; i < std::min(ranked, count); ++i) SetBit(row, BlockOf(keys[i]));
}

} // namespace flashprefill::cpu
