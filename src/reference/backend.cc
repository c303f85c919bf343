// The reference as a backend: everything is supported, on every machine, and nothing asks for scratch memory.
#include "core/backend.h"

#include <chrono>

#include "reference/reference.h"

namespace flashprefill {
namespace {

class Stopwatch {
 public:
  double Seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

bool Available() { return true; }
std::string Describe() { return "scalar loops in double precision, one thread: for tests, not for use"; }
std::vector<std::string> Targets() { return {}; }
void Check(const Problem&, const Policy*, const BlockMask*, const Exec&) {}
size_t SelectWorkspace(const Problem&, const Policy&, const Exec&) { return 0; }
size_t AttendWorkspace(const Problem&, const BlockMask&, const Exec&) { return 0; }

void Select(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void*) {
  const Stopwatch watch;
  reference::Select(p, policy, mask);
  if (exec.timings) exec.timings->select_seconds = watch.Seconds();
}

void Attend(const Problem& p, const BlockMask& mask, const Exec& exec, const Output& output, void*) {
  const Stopwatch watch;
  reference::Attend(p, mask, output);
  if (exec.timings) exec.timings->attend_seconds = watch.Seconds();
}

} // namespace

extern const Backend kReferenceBackend = {"reference",     FP_CPU,          0,      Available, Describe, Targets, Check,
                                          SelectWorkspace, AttendWorkspace, Select, Attend,    nullptr,  nullptr};

} // namespace flashprefill
