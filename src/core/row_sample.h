// A sample of a sequence's query rows: these are cut into equal segments, and the last rows of each are taken. The same
// arithmetic on all backends, because a row more or less changes everything that follows.
#ifndef FLASHPREFILL_CORE_ROW_SAMPLE_H_
#define FLASHPREFILL_CORE_ROW_SAMPLE_H_

#include <algorithm>
#include <cstdint>

namespace flashprefill {

struct RowSample {
  int64_t rows, segments, tail;

  // As many segments as make their last `tail` rows about the share `ratio` of all rows.
  static constexpr RowSample Of(int64_t rows, double ratio, int tail) {
    // Not negative, so this rounds; llround is not constexpr. NOLINTNEXTLINE(bugprone-incorrect-roundings)
    const int64_t wanted = static_cast<int64_t>(static_cast<double>(rows) * ratio / tail + 0.5);
    return {rows, std::clamp<int64_t>(wanted, 1, std::max<int64_t>(rows, 1)), tail};
  }

  constexpr int64_t End(int64_t segment) const { return (segment + 1) * rows / segments; }
  constexpr int64_t Begin(int64_t segment) const { return std::max(segment * rows / segments, End(segment) - tail); }
};

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_ROW_SAMPLE_H_
