// Select of policies that have a file of their own: each two functions, as a Backend has them.
#ifndef FLASHPREFILL_CPU_POLICIES_H_
#define FLASHPREFILL_CPU_POLICIES_H_

#include <cstddef>

#include "core/types.h"

namespace flashprefill::cpu {

size_t XAttentionWorkspace(const Problem& p, const Policy& policy, const Exec& exec);
void SelectXAttention(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace);

size_t RRAttentionWorkspace(const Problem& p, const Policy& policy, const Exec& exec);
void SelectRRAttention(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace);

size_t SpargeAttnWorkspace(const Problem& p, const Policy& policy, const Exec& exec);
void SelectSpargeAttn(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace);

size_t PrismWorkspace(const Problem& p, const Policy& policy, const Exec& exec);
void SelectPrism(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace);

size_t SampleAttentionWorkspace(const Problem& p, const Policy& policy, const Exec& exec);
void SelectSampleAttention(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_POLICIES_H_
