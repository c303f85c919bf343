// The table of policies: their structs' sizes and published defaults.
#ifndef FLASHPREFILL_CORE_POLICIES_H_
#define FLASHPREFILL_CORE_POLICIES_H_

#include <cstddef>
#include <cstdint>

namespace flashprefill {

size_t PolicySize(int32_t kind);             // 0 for a kind that is not there
void InitPolicy(int32_t kind, void* policy); // policy points at PolicySize(kind) bytes

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_POLICIES_H_
