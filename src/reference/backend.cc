// The reference as a backend: everything is supported, on every machine, and nothing asks for scratch memory.
#include "core/backend.h"

#include "reference/reference.h"

namespace flashprefill {
namespace {

bool Available() { return true; }
std::string Describe() { return "scalar loops in double precision, one thread: for tests, not for use"; }
std::vector<std::string> Targets() { return {}; }
void Check(const Problem&, const Policy*, const BlockMask*, const Exec&) {}
size_t SelectWorkspace(const Problem&, const Policy&, const Exec&) { return 0; }
size_t AuditWorkspace(const Problem&, const BlockMask&, const Exec&, int64_t) { return 0; }
size_t AttendWorkspace(const Problem&, const BlockMask&, const Exec&) { return 0; }

void Select(const Problem& p, const Policy& policy, const Exec&, BlockMask& mask, void*) {
  reference::Select(p, policy, mask);
}

void Attend(const Problem& p, const BlockMask& mask, const Exec&, const Output& output, void*) {
  reference::Attend(p, mask, output);
}

void Audit(const Problem& p, const BlockMask& mask, const Exec&, std::span<AuditRow> rows, void*) {
  reference::Audit(p, mask, rows);
}

} // namespace

extern const Backend kReferenceBackend = {
    "reference",     FP_CPU, 0,      Available, Describe, Targets, Check,          SelectWorkspace,
    AttendWorkspace, Select, Attend, nullptr,   nullptr,  nullptr, AuditWorkspace, Audit};

} // namespace flashprefill
