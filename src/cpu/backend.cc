// The CPU backend: select and attend by SIMD kernels, on threads of whichever OpenMP runtime the process has.
#include "core/backend.h"

#include "core/error.h"
#include "core/threads.h"
#include "cpu/attend/attend.h"
#include "cpu/audit/audit.h"
#include "cpu/selector.h"
#include "cpu/simd/targets.h"

namespace flashprefill {
namespace {

bool Available() { return true; }

std::vector<std::string> Targets() {
  std::vector<std::string> names;
  for (cpu::Isa isa : cpu::IsasHere()) names.emplace_back(cpu::IsaName(isa));
  return names;
}

std::string Describe() {
  std::string line = "SIMD kernels:";
  for (const std::string& name : Targets()) line += " " + name;
  return line + "; " + std::to_string(ThreadCount(0)) + " threads of " + ThreadRuntime();
}

void Check(const Problem&, const Policy* policy, const BlockMask*, const Exec&) {
  if (policy && !cpu::SelectorOf(*policy)) throw Error(FP_UNSUPPORTED, "policy: the CPU does not select by it");
}

size_t SelectWorkspace(const Problem& p, const Policy& policy, const Exec& exec) {
  return cpu::SelectorOf(policy)->workspace(p, policy, exec);
}

void Select(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace) {
  cpu::SelectorOf(policy)->select(p, policy, exec, mask, workspace);
}

} // namespace

extern const Backend kCpuBackend = {"cpu",     FP_CPU,          1,
                                    Available, Describe,        Targets,
                                    Check,     SelectWorkspace, cpu::AttendWorkspace,
                                    Select,    cpu::Attend,     nullptr,
                                    nullptr,   nullptr,         cpu::AuditWorkspace,
                                    cpu::Audit};

} // namespace flashprefill
