// See key_threshold.h.
#include "cpu/key_threshold.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>

namespace flashprefill::cpu {
namespace {

constexpr int kShift = 20;  // leaves the sign, 8 bits of exponent and 3 of mantissa
constexpr int kBins = 2048; // half of them are of negative numbers, and never used

int BinOf(float energy) { return static_cast<int>(std::bit_cast<uint32_t>(energy) >> kShift); }
double Lower(int bin) { return std::bit_cast<float>(static_cast<uint32_t>(bin) << kShift); } // the least in a bin
uint64_t Rank(float energy, int64_t i) {
  return uint64_t{std::bit_cast<uint32_t>(energy)} << 32 | ~static_cast<uint32_t>(i);
}
double EnergyOf(uint64_t rank) { return std::bit_cast<float>(static_cast<uint32_t>(rank >> 32)); }
uint64_t LeastRank(int bin) { return uint64_t{static_cast<uint32_t>(bin) << kShift} << 32; }

class Histogram {
 public:
  Histogram(const float* energies, int64_t n) : energies_(energies), n_(n) {
    for (int64_t i = 0; i < n; ++i) {
      const int bin = BinOf(energies[i]);
      top_ = std::max(top_, bin);
      ++counts_[bin];
      sums_[bin] += double{energies[i]};
    }
  }

  // The best `count`, which are fewer than n.
  KeyThreshold ByCount(int64_t count, uint64_t* ranks) const {
    if (count == 0) return {};
    int64_t above = 0;
    int bin = top_;
    for (; above + counts_[bin] < count; --bin) above += counts_[bin];
    const int64_t some = RanksOf(bin, bin, ranks), last = count - above - 1;
    std::nth_element(ranks, ranks + last, ranks + some, std::greater<>());
    return {ranks[last], count, count};
  }

  // Both factors of a key's gain fall with its rank, so bins are in, then in part, then out. What is left from a key on
  // is added up from the least energies, as they would drown in what rounding leaves of the sum of all.
  KeyThreshold ByGain(double gain, double left_out, uint64_t* ranks) const {
    const auto worth = [&](double energy, double rest) { return energy * std::sqrt(rest) >= gain; };
    double below[kBins]; // the sums of the bins below each
    below[0] = left_out;
    for (int bin = 1; bin <= top_; ++bin) below[bin] = below[bin - 1] + sums_[bin - 1];
    int64_t above = 0;
    int high = top_; // the bins above it are in: even their last key would be worth it at the bin's lower end
    for (; high >= 0 && worth(Lower(high), below[high] + Lower(high)); --high) above += counts_[high];
    int low = high; // the bins from here on are out: not even their first key is worth it at the bin's upper end
    while (low >= 0 && worth(Lower(low + 1), below[low] + sums_[low])) --low;
    int64_t in = RanksOf(low + 1, high, ranks);
    std::sort(ranks, ranks + in, std::greater<>());
    double rest = low < 0 ? left_out : below[low] + sums_[low];
    for (; in > 0; --in) {
      rest += EnergyOf(ranks[in - 1]);
      if (worth(EnergyOf(ranks[in - 1]), rest)) break;
    }
    return {in > 0 ? ranks[in - 1] : LeastRank(high + 1), above + in, above + in};
  }

 private:
  // The ranks of the keys in bins [low, high], in no order.
  int64_t RanksOf(int low, int high, uint64_t* ranks) const {
    int64_t found = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const int bin = BinOf(energies_[i]);
      if (bin >= low && bin <= high) ranks[found++] = Rank(energies_[i], i);
    }
    return found;
  }

  const float* energies_;
  const int64_t n_;
  int top_ = 0; // the highest bin with a key; not far above it bins are of infinities and NaN
  int32_t counts_[kBins] = {};
  double sums_[kBins] = {};
};

} // namespace

KeyThreshold FindKeyThreshold(const float* energies, int64_t n, const KeyRule& rule, uint64_t* ranks) {
  const Histogram histogram(energies, n);
  const auto by_count = [&](int64_t count) {
    return count < n ? histogram.ByCount(count, ranks) : KeyThreshold{0, n, n}; // every rank is at least 0
  };
  KeyThreshold threshold =
      std::isnan(rule.gain) ? by_count(rule.count) : histogram.ByGain(rule.gain, rule.below, ranks);
  if (threshold.kept <= rule.room) return threshold;
  const int64_t wanted = threshold.wanted;
  threshold = by_count(rule.room);
  threshold.wanted = wanted;
  return threshold;
}

void TakeKeys(const float* energies, const int32_t* keys, int64_t n, const KeyThreshold& threshold, int32_t* taken) {
  const uint32_t value = static_cast<uint32_t>(threshold.least >> 32);
  const int64_t last_equal = ~static_cast<uint32_t>(threshold.least); // of those with this energy
  for (int64_t begin = 0; begin < n; begin += 64) {
    const int64_t end = std::min(begin + 64, n);
    uint64_t word = 0;
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t bits = std::bit_cast<uint32_t>(energies[i]);
      word |= uint64_t{bits > value || (bits == value && i <= last_equal)} << (i - begin);
    }
    for (; word != 0; word &= word - 1) {
      const int64_t i = begin + std::countr_zero(word);
      *taken++ = keys ? keys[i] : static_cast<int32_t>(i);
    }
  }
}

} // namespace flashprefill::cpu
