// MInference's patterns of heads, and the numbers that its reference and its kernels share.
#ifndef FLASHPREFILL_METHODS_MINFERENCE_PATTERNS_H_
#define FLASHPREFILL_METHODS_MINFERENCE_PATTERNS_H_

#include <algorithm>
#include <cstdint>

#include "core/types.h"

namespace flashprefill::methods::minference {

constexpr int64_t kRows = 64;           // last query rows by which verticals and slashes are found
constexpr int64_t kFirstVerticals = 30; // always kept, and the fewest
constexpr int64_t kNearSlashes = 100;   // nearest slashes, which rank before all others
constexpr int64_t kLeastSlashes = 50;   // the fewest

inline int64_t VerticalsOf(const fp_minference_head& head) { return std::max<int64_t>(head.a, kFirstVerticals); }
inline int64_t SlashesOf(const fp_minference_head& head) { return std::max<int64_t>(head.b, kLeastSlashes); }

// Patterns that a policy has: one for each query head, or one that stands for all.
inline int64_t PatternCount(const fp_minference& policy, const Problem& p) {
  return policy.head_count > 0 ? p.q_heads : 1;
}

// The pattern of a query head.
inline fp_minference_head PatternOf(const fp_minference& policy, int64_t head) {
  if (policy.head_count > 0) return policy.heads[head];
  return {FP_VERTICAL_SLASH, policy.vertical, policy.slash};
}

} // namespace flashprefill::methods::minference

#endif // FLASHPREFILL_METHODS_MINFERENCE_PATTERNS_H_
