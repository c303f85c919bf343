// Which query rows SampleAttention looks at, and how far its window reaches: the same for all backends, because a row
// more or less changes everything that follows.
#ifndef FLASHPREFILL_METHODS_SAMPLE_ATTENTION_ROW_SAMPLE_H_
#define FLASHPREFILL_METHODS_SAMPLE_ATTENTION_ROW_SAMPLE_H_

#include <algorithm>
#include <cmath>

#include "core/row_sample.h"
#include "core/types.h"

namespace flashprefill::methods::sample_attention {

inline RowSample SampleOf(const fp_sample_attention& policy, const Sequence& s) {
  return RowSample::Of(s.q_len, policy.sample_ratio, policy.sample_rows);
}

// The first block of the window of a tile: tokens less than ceil(window_ratio * keys) before its first row.
inline int64_t WindowBegin(const fp_sample_attention& policy, const Sequence& s, const Tile& tile, int block_size) {
  const int64_t tokens = static_cast<int64_t>(std::ceil(static_cast<double>(policy.window_ratio) * s.k_len));
  return std::min(tile.diagonal, std::max<int64_t>(0, s.prefix + tile.begin - tokens + 1) / block_size);
}

} // namespace flashprefill::methods::sample_attention

#endif // FLASHPREFILL_METHODS_SAMPLE_ATTENTION_ROW_SAMPLE_H_
