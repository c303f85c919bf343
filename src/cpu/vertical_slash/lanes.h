// Query rows as lanes of panels (see kernels.h): how a row gets there, and what its softmax needs.
#ifndef FLASHPREFILL_CPU_VERTICAL_SLASH_LANES_H_
#define FLASHPREFILL_CPU_VERTICAL_SLASH_LANES_H_

#include <cmath>
#include <limits>

#include "core/half.h"
#include "cpu/vertical_slash/kernels.h"

namespace flashprefill::cpu {

// An fp32 row into a lane of panels.
inline void PutLane(const float* row, int64_t depth, float factor, int64_t lane, float* panels) {
  float* to = panels + lane / kPanelRows * kPanelRows * depth + lane % kPanelRows;
  for (int64_t i = 0; i < depth; ++i) to[i * kPanelRows] = row[i] * factor;
}

// A sum of n rows becomes their mean, rounded once.
inline void FinishMean(float* sum, int64_t depth, int64_t n, int32_t dtype) {
  for (int64_t i = 0; i < depth; ++i) sum[i] = RoundTo(dtype, sum[i] / static_cast<float>(n));
}

// The reference of a lane's softmax with which its shares sum to `total`.
inline float LaneReference(float largest, float sum, float total) {
  // Without a finite score the row is ignored.
  return sum > 0 ? largest + std::log2(sum / total) : std::numeric_limits<float>::infinity();
}

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_VERTICAL_SLASH_LANES_H_
