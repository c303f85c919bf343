// The CPU backend: select and attend by SIMD kernels, on threads of whichever OpenMP runtime the process has.
#include "core/backend.h"

#include "core/threads.h"
#include "cpu/attend.h"
#include "cpu/select.h"
#include "cpu/targets.h"

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

void Check(const Problem&, const Policy*, const BlockMask*, const Exec&) {} // all that is valid is done

} // namespace

extern const Backend kCpuBackend = {
    "cpu",       FP_CPU,      1,       Available, Describe, Targets, Check, cpu::SelectWorkspace, cpu::AttendWorkspace,
    cpu::Select, cpu::Attend, nullptr, nullptr};

} // namespace flashprefill
