// What follows from SpargeAttn's fields: the same for all backends, because one block more or fewer changes the mask.
#ifndef FLASHPREFILL_METHODS_SPARGE_ATTN_RULES_H_
#define FLASHPREFILL_METHODS_SPARGE_ATTN_RULES_H_

#include <cmath>

#include "core/types.h"

namespace flashprefill::methods::sparge_attn {

// floor(topk * blocks). A topk that came as a decimal fraction, and was rounded down, still means that fraction.
inline int64_t TopBlocks(const fp_sparge_attn& policy, int64_t blocks) {
  return static_cast<int64_t>(double{policy.topk} * static_cast<double>(blocks) * (1 + 1e-6));
}

// The cosine above which a block is self-similar. Where none is given: what the authors use with cdf and with topk.
inline float SimilarityOf(const fp_sparge_attn& policy) {
  if (!std::isnan(policy.similarity)) return policy.similarity;
  return std::isnan(policy.topk) ? 0.6f : -0.1f;
}

} // namespace flashprefill::methods::sparge_attn

#endif // FLASHPREFILL_METHODS_SPARGE_ATTN_RULES_H_
