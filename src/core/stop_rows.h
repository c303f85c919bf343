// What all backends share of S2O: how many keys are added at a time, and which rows say when to stop.
#ifndef FLASHPREFILL_CORE_STOP_ROWS_H_
#define FLASHPREFILL_CORE_STOP_ROWS_H_

#include <cstdint>

namespace flashprefill {

constexpr int64_t kGroupKeys = 128; // a tile of keys of the authors' kernel
constexpr int kGroupsBelow = 2;     // in a row that stop it: ratios fall on average only

// SEGMENT has the query tokens [begin, end).
template <class SEGMENT>
constexpr int64_t StopRows(int64_t wanted, const SEGMENT& segment) {
  const int64_t tokens = segment.end - segment.begin;
  return wanted < tokens ? wanted : tokens;
}

// Row r of `rows`, evenly spaced, the segment's last row among them.
template <class SEGMENT>
constexpr int64_t StopRow(const SEGMENT& segment, int64_t r, int64_t rows) {
  return segment.begin + (r + 1) * (segment.end - segment.begin) / rows - 1;
}

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_STOP_ROWS_H_
