// What the reference and the CPU share of S2O: how many keys are added at a time, and which rows say when to stop.
#ifndef FLASHPREFILL_METHODS_S2O_STOP_H_
#define FLASHPREFILL_METHODS_S2O_STOP_H_

#include "core/segment.h"

namespace flashprefill::methods::s2o {

constexpr int64_t kGroupKeys = 128; // a tile of keys of the authors' kernel
constexpr int kGroupsBelow = 2;     // in a row that stop it: ratios fall on average only

inline int64_t StopRows(const fp_s2o& policy, const Segment& segment) {
  return std::min<int64_t>(policy.stop_rows, segment.end - segment.begin);
}

// Row r of `rows`, evenly spaced, the segment's last row among them.
inline int64_t StopRow(const Segment& segment, int64_t r, int64_t rows) {
  return segment.begin + (r + 1) * (segment.end - segment.begin) / rows - 1;
}

} // namespace flashprefill::methods::s2o

#endif // FLASHPREFILL_METHODS_S2O_STOP_H_
