// The numbers of MInference that its reference and its kernels share.
#ifndef FLASHPREFILL_CORE_MINFERENCE_H_
#define FLASHPREFILL_CORE_MINFERENCE_H_

#include <cstdint>

#include "flashprefill/flashprefill.h"

namespace flashprefill {

constexpr int64_t kMInferenceRows = 64;           // query rows that vertical and slash lines are found by
constexpr int64_t kMInferenceColumns = 30;        // first columns, always kept, and the fewest
constexpr int64_t kMInferenceDistances = 100;     // nearest distances, which rank before all others
constexpr int64_t kMInferenceLeastDistances = 50; // the fewest

// The pattern of a query head.
inline fp_minference_head MInferenceHead(const fp_minference& policy, int64_t head) {
  if (policy.head_count > 0) return policy.heads[head];
  return {FP_VERTICAL_SLASH, policy.vertical, policy.slash};
}

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_MINFERENCE_H_
