// Whether a sequence is selected for at all: the one answer that every backend gives.
#ifndef FLASHPREFILL_CORE_FALLBACK_H_
#define FLASHPREFILL_CORE_FALLBACK_H_

#include "core/minference.h"
#include "core/types.h"

namespace flashprefill {

// FlexPrefill selects for more keys than two blocks and than its least budget, for more than one query row.
inline bool TooShortFor(const fp_flexprefill& f, const Sequence& s) {
  const int64_t size = f.common.block_size;
  return s.q_len == 1 || s.k_len <= std::max(2 * size, DivUp<int64_t>(f.min_budget, size) * size);
}

// MInference selects for more than one query row, where some head does not ask for all keys anyway.
inline bool TooShortFor(const fp_minference& m, const Problem& p, const Sequence& s) {
  const auto takes_all = [&](const fp_minference_head& head) {
    switch (head.pattern) {
      case FP_A_SHAPE:
        return int64_t{head.a} + head.b >= s.k_len;
      case FP_BLOCK_SPARSE:
        return int64_t{head.a} * m.common.block_size >= s.k_len;
      default:
        return std::max<int64_t>(head.a, kMInferenceColumns) >= s.k_len ||
               std::max<int64_t>(head.b, kMInferenceLeastDistances) >= s.k_len;
    }
  };
  if (s.q_len == 1) return true;
  for (int64_t h = 0; h < (m.head_count > 0 ? p.q_heads : 1); ++h) {
    if (!takes_all(MInferenceHead(m, h))) return false;
  }
  return true;
}

// fp_fallback of a sequence. Where it is not FP_SELECTED everything is kept.
inline int32_t FallbackOf(const Problem& p, const Geometry& g, const Policy& policy, const Sequence& s) {
  if (policy.kind == FP_DENSE) return FP_FALLBACK_DENSE;
  bool is_short = AllForced(p, g, policy, s);
  if (policy.kind == FP_FLEXPREFILL) is_short |= TooShortFor(reinterpret_cast<const fp_flexprefill&>(policy), s);
  if (policy.kind == FP_MINFERENCE) is_short |= TooShortFor(reinterpret_cast<const fp_minference&>(policy), p, s);
  return is_short ? FP_FALLBACK_SHORT : FP_SELECTED;
}

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_FALLBACK_H_
