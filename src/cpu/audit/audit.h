// Audit on the CPU: see audit.cc.
#ifndef FLASHPREFILL_CPU_AUDIT_AUDIT_H_
#define FLASHPREFILL_CPU_AUDIT_AUDIT_H_

#include <span>

#include "core/backend.h"

namespace flashprefill::cpu {

size_t AuditWorkspace(const Problem& p, const BlockMask& mask, const Exec& exec, int64_t rows);
void Audit(const Problem& p, const BlockMask& mask, const Exec& exec, std::span<AuditRow> rows, void* workspace);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_AUDIT_AUDIT_H_
