// How many blocks SpargeAttn's topk is: the same for all backends, because one more or fewer changes the mask.
#ifndef FLASHPREFILL_METHODS_SPARGE_ATTN_TOP_BLOCKS_H_
#define FLASHPREFILL_METHODS_SPARGE_ATTN_TOP_BLOCKS_H_

#include "core/types.h"

namespace flashprefill::methods::sparge_attn {

// floor(topk * blocks). A topk that came as a decimal fraction, and was rounded down, still means that fraction.
inline int64_t TopBlocks(const fp_sparge_attn& policy, int64_t blocks) {
  return static_cast<int64_t>(double{policy.topk} * static_cast<double>(blocks) * (1 + 1e-6));
}

} // namespace flashprefill::methods::sparge_attn

#endif // FLASHPREFILL_METHODS_SPARGE_ATTN_TOP_BLOCKS_H_
