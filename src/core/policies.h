// The table of policies: their structs' sizes and published defaults.
#ifndef FLASHPREFILL_CORE_POLICIES_H_
#define FLASHPREFILL_CORE_POLICIES_H_

#include <cstddef>
#include <cstdint>

#include "flashprefill/flashprefill.h"

namespace flashprefill {

size_t PolicySize(int32_t kind);             // 0 for a kind that is not there
void InitPolicy(int32_t kind, void* policy); // policy points at PolicySize(kind) bytes

// floor(topk * blocks), where a topk that came as a decimal fraction, and was rounded down, still means that fraction.
inline int64_t TopBlocks(const fp_sparge_attn& policy, int64_t blocks) {
  return static_cast<int64_t>(double{policy.topk} * static_cast<double>(blocks) * (1 + 1e-6));
}

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_POLICIES_H_
