// The largest values of a set whose sum stays at or below a limit, found without sorting them: a radix select that
// weighs digits by what they sum to. Values are not negative, so their bits order as they do. Three passes look at 11,
// 11 and 10 bits; a pass may compute the values afresh, so that nothing of the set's size is ever stored.
#ifndef FLASHPREFILL_CPU_VERTICAL_SLASH_RADIX_THRESHOLD_H_
#define FLASHPREFILL_CPU_VERTICAL_SLASH_RADIX_THRESHOLD_H_

#include <bit>
#include <cstdint>

namespace flashprefill::cpu {

// In falling order, the values above `value` are in, and the first `equal` of those that equal it: the next one would
// pass the limit. Without a crossing all are in.
struct RadixThreshold {
  bool crosses;
  float value;
  int64_t above; // how many values are above it
  int64_t equal;

  int64_t count() const { return above + equal; } // where it crosses
};

// each(visit) calls visit(x) for every value, in whatever order, but the same in each pass.
template <typename Each>
RadixThreshold FindRadixThreshold(double limit, const Each& each) {
  constexpr int kShift[3] = {21, 10, 0};
  constexpr int kBits[3] = {11, 11, 10};
  uint32_t prefix = 0; // of the crossing value: its higher digits
  double sum = 0;      // of the values that are in for sure
  int64_t above = 0;
  for (int pass = 0; pass < 3; ++pass) {
    double sums[2048] = {};
    int64_t counts[2048] = {};
    const int shift = kShift[pass], digits = 1 << kBits[pass];
    each([&](float x) {
      const uint32_t bits = std::bit_cast<uint32_t>(x);
      if (pass > 0 && bits >> kShift[pass - 1] != prefix) return;
      const uint32_t digit = bits >> shift & (digits - 1);
      sums[digit] += double{x};
      ++counts[digit];
    });
    int digit = digits - 1;
    for (; digit >= 0 && sum + sums[digit] <= limit; --digit) {
      sum += sums[digit];
      above += counts[digit];
    }
    if (digit < 0) {
      if (pass == 0) return {false, 0, above, 0};
      digit = 0; // rounding alone got it past the last digit: that is where it crosses
      sum -= sums[0];
      above -= counts[0];
    }
    prefix = pass == 0 ? static_cast<uint32_t>(digit) : prefix << kBits[pass] | static_cast<uint32_t>(digit);
  }
  const float value = std::bit_cast<float>(prefix);
  int64_t equal = 0;
  while (value > 0 && sum + value <= limit) {
    sum += value;
    ++equal;
  }
  return {true, value, above, equal};
}

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_VERTICAL_SLASH_RADIX_THRESHOLD_H_
