// The C ABI: each function checks its arguments, finds the backend and calls it. No exception leaves this file.
#include <chrono>
#include <cstring>
#include <new>
#include <string>

#include "core/backend.h"
#include "core/error.h"
#include "core/guard.h"
#include "core/mask_memory.h"
#include "core/mask_stats.h"
#include "core/method.h"
#include "core/threads.h"
#include "core/types.h"
#include "core/validate.h"
#include "flashprefill/flashprefill.h"

namespace flashprefill {
namespace {

thread_local std::string last_error;

// Runs the body of a C function and turns what it throws into a status and the thread's message.
template <typename Body>
fp_status Guard(Body&& body) {
  try {
    body();
    return FP_OK;
  } catch (const Error& error) {
    last_error = error.what();
    return error.status();
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
    return FP_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    last_error = std::string("internal error: ") + error.what();
    return FP_INTERNAL;
  }
}

Exec ExecOf(const Exec* exec) {
  ValidateExec(exec);
  Exec e{};
  fp_exec_init(&e);
  if (exec) e = *exec;
  return e;
}

// Refuses a guard where there is no code for it.
void CheckGuard(const Backend& backend, const Problem& p, const Exec& e) {
  ValidateGuard(e.guard, p);
  if (e.guard && !backend.audit && !backend.guard) {
    Refuse("guard", "given", "NULL for the backend " + std::string(backend.name), FP_UNSUPPORTED);
  }
}

// fp_select and fp_attend have no use for a guard.
void RefuseGuard(const Exec& e, const char* verb) {
  if (e.guard) Refuse("exec.guard", "given", std::string("NULL for ") + verb + ": fp_prefill and fp_audit take one");
}

// Scratch memory of the guard, which runs between select and attend.
size_t GuardScratch(const Backend& backend, const Problem& p, const Policy& policy, const BlockMask& mask,
                    const Exec& exec) {
  return exec.guard ? GuardWorkspace(backend, p, &policy, mask, exec) : 0;
}

// Scratch memory besides the mask: of select and then attend, or of a fused prefill.
size_t PrefillScratch(const Backend& backend, const Problem& p, const Policy& policy, const BlockMask& mask,
                      const Exec& exec) {
  if (backend.prefill) return backend.prefill_workspace(p, policy, mask, exec);
  return std::max({backend.select_workspace(p, policy, exec), backend.attend_workspace(p, mask, exec),
                   GuardScratch(backend, p, policy, mask, exec)});
}

class Stopwatch {
 public:
  double Lap() {
    const auto now = std::chrono::steady_clock::now();
    const double seconds = std::chrono::duration<double>(now - last_).count();
    last_ = now;
    return seconds;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

size_t CopyText(const std::string& text, char* to, size_t size) {
  if (to && size > 0) {
    const size_t n = std::min(size - 1, text.size());
    std::memcpy(to, text.data(), n);
    to[n] = 0;
  }
  return text.size();
}

const Method& MethodOfKind(int32_t kind) {
  const Method* method = FindMethod(kind);
  if (!method) Refuse("kind", kind, "one of fp_policy_kind");
  return *method;
}

template <typename T>
void CheckPointer(const char* name, const T* pointer) {
  if (!pointer) Refuse(name, "NULL", "the address of the result");
}

} // namespace
} // namespace flashprefill

using namespace flashprefill;

extern "C" {

const char* fp_last_error(void) { return last_error.c_str(); }

#define FP_STRINGIFY(x) #x
#define FP_DOTTED(major, minor, patch) FP_STRINGIFY(major) "." FP_STRINGIFY(minor) "." FP_STRINGIFY(patch)
const char* fp_version(void) { return FP_DOTTED(FP_VERSION_MAJOR, FP_VERSION_MINOR, FP_VERSION_PATCH); }

void fp_problem_init(fp_problem* problem) {
  *problem = fp_problem{};
  problem->struct_size = sizeof(fp_problem);
  problem->causal = 1;
  problem->final_chunk = 1;
}

void fp_exec_init(fp_exec* exec) {
  *exec = fp_exec{};
  exec->struct_size = sizeof(fp_exec);
}

void fp_guard_init(fp_guard* guard) {
  *guard = fp_guard{};
  guard->struct_size = sizeof(fp_guard);
  guard->target = 0.9f;
  guard->risk = 1e-3f;
}

void fp_block_mask_init(fp_block_mask* mask) {
  *mask = fp_block_mask{};
  mask->struct_size = sizeof(fp_block_mask);
}

void fp_output_init(fp_output* output) {
  *output = fp_output{};
  output->struct_size = sizeof(fp_output);
}

void fp_stats_init(fp_stats* stats) {
  *stats = fp_stats{};
  stats->struct_size = sizeof(fp_stats);
}

fp_status fp_policy_init(int32_t kind, void* policy, size_t size) {
  return Guard([&] {
    const Method& method = MethodOfKind(kind);
    if (!policy) Refuse("policy", "NULL", "the address of a policy");
    if (size < method.size)
      Refuse("size", size, "the size of that policy's struct (" + std::to_string(method.size) + ")");
    InitPolicy(method, *static_cast<Policy*>(policy));
  });
}

const char* fp_policy_name(int32_t index, int32_t* kind) {
  const auto methods = Methods();
  if (index < 0 || static_cast<size_t>(index) >= methods.size()) return nullptr;
  if (kind) *kind = methods[index]->kind;
  return methods[index]->name;
}

fp_status fp_policy_field_at(int32_t kind, int32_t index, fp_policy_field* field) {
  return Guard([&] {
    const Field* found = FieldAt(MethodOfKind(kind), index);
    if (!found) Refuse("index", index, "from 0 to the number of fields less 1");
    CheckPointer("field", field);
    *field = *found;
  });
}

fp_status fp_policy_parse(const char* text, void* policy, size_t size, size_t* needed) {
  return Guard([&] {
    if (!text) Refuse("text", "NULL", "a policy as text");
    const size_t bytes = ParsePolicy(text, policy, size);
    if (needed) *needed = bytes;
  });
}

size_t fp_policy_print(const fp_policy* policy, char* text, size_t size) {
  size_t length = 0;
  Guard([&] {
    if (!policy) Refuse("policy", "NULL", "a policy");
    length = CopyText(PrintPolicy(*policy), text, size);
  });
  return length;
}

fp_status fp_mask_describe(const fp_problem* problem, const fp_policy* policy, fp_block_mask* mask) {
  return Guard([&] {
    ValidateProblem(problem);
    ValidatePolicy(policy, *problem);
    CheckPointer("mask", mask);
    BlockMask described = DescribeMask(*problem, *policy);
    described.bits = mask->bits;
    described.counts = mask->counts;
    described.fallback = mask->fallback;
    described.vertical_slash = mask->vertical_slash;
    described.key_lists = mask->key_lists;
    described.skipped = mask->skipped;
    *mask = described;
  });
}

fp_status fp_mask_stats(const fp_problem* problem, const fp_block_mask* mask, fp_stats* stats) {
  return Guard([&] {
    ValidateProblem(problem);
    ValidateMask(mask, *problem);
    ValidateVerticalSlash(*mask, *problem);
    ValidateKeyLists(*mask, *problem);
    CheckPointer("stats", stats);
    const Problem& p = *problem;
    if (p.device != FP_CPU) Refuse("device", p.device, "FP_CPU (0): copy the mask to the host first");
    CountKept(p, *mask, *stats);
  });
}

fp_status fp_select_workspace(const fp_problem* problem, const fp_policy* policy, const fp_exec* exec, size_t* bytes) {
  return Guard([&] {
    ValidateProblem(problem);
    ValidatePolicy(policy, *problem);
    CheckPointer("bytes", bytes);
    const Exec e = ExecOf(exec);
    const Backend& backend = BackendFor(*problem, e);
    backend.check(*problem, policy, nullptr, e);
    *bytes = backend.select_workspace(*problem, *policy, e);
  });
}

fp_status fp_attend_workspace(const fp_problem* problem, const fp_block_mask* mask, const fp_exec* exec,
                              size_t* bytes) {
  return Guard([&] {
    ValidateProblem(problem);
    ValidateMask(mask, *problem, false);
    CheckPointer("bytes", bytes);
    const Exec e = ExecOf(exec);
    const Backend& backend = BackendFor(*problem, e);
    backend.check(*problem, nullptr, mask, e);
    *bytes = backend.attend_workspace(*problem, *mask, e);
  });
}

fp_status fp_prefill_workspace(const fp_problem* problem, const fp_policy* policy, const fp_exec* exec, size_t* bytes) {
  return Guard([&] {
    ValidateProblem(problem);
    ValidatePolicy(policy, *problem);
    CheckPointer("bytes", bytes);
    const Exec e = ExecOf(exec);
    const Backend& backend = BackendFor(*problem, e);
    CheckGuard(backend, *problem, e);
    Workspace layout(nullptr);
    const BlockMask mask = MaskIn(layout, *problem, *policy);
    backend.check(*problem, policy, &mask, e);
    *bytes = layout.used() + PrefillScratch(backend, *problem, *policy, mask, e);
  });
}

fp_status fp_select(const fp_problem* problem, const fp_policy* policy, const fp_exec* exec, fp_block_mask* mask,
                    void* workspace, size_t workspace_bytes) {
  return Guard([&] {
    ValidateProblem(problem);
    ValidatePolicy(policy, *problem);
    ValidateMask(mask, *problem);
    ValidateMaskOf(*mask, *policy, *problem);
    const Exec e = ExecOf(exec);
    RefuseGuard(e, "fp_select");
    const Backend& backend = BackendFor(*problem, e);
    backend.check(*problem, policy, mask, e);
    ValidateWorkspace(workspace, workspace_bytes, backend.select_workspace(*problem, *policy, e));
    Stopwatch watch;
    backend.select(*problem, *policy, e, *mask, workspace);
    if (e.timings) *e.timings = {watch.Lap(), 0, 0};
  });
}

fp_status fp_attend(const fp_problem* problem, const fp_block_mask* mask, const fp_exec* exec, const fp_output* output,
                    void* workspace, size_t workspace_bytes) {
  return Guard([&] {
    ValidateProblem(problem);
    ValidateMask(mask, *problem);
    ValidateVerticalSlash(*mask, *problem);
    ValidateKeyLists(*mask, *problem);
    ValidateOutput(output, *problem);
    const Exec e = ExecOf(exec);
    RefuseGuard(e, "fp_attend");
    const Backend& backend = BackendFor(*problem, e);
    backend.check(*problem, nullptr, mask, e);
    ValidateWorkspace(workspace, workspace_bytes, backend.attend_workspace(*problem, *mask, e));
    Stopwatch watch;
    backend.attend(*problem, *mask, e, *output, workspace);
    if (e.timings) *e.timings = {0, watch.Lap(), 0};
  });
}

fp_status fp_prefill(const fp_problem* problem, const fp_policy* policy, const fp_exec* exec, fp_block_mask* mask,
                     const fp_output* output, void* workspace, size_t workspace_bytes) {
  return Guard([&] {
    ValidateProblem(problem);
    ValidatePolicy(policy, *problem);
    if (mask) {
      ValidateMask(mask, *problem, false);
      ValidateMaskOf(*mask, *policy, *problem);
    }
    ValidateOutput(output, *problem);
    const Exec e = ExecOf(exec);
    const Backend& backend = BackendFor(*problem, e);
    CheckGuard(backend, *problem, e);
    Workspace parts(workspace);
    BlockMask kept = MaskIn(parts, *problem, *policy);
    if (mask) {
      if (mask->bits) kept.bits = mask->bits;
      if (mask->vertical_slash) kept.vertical_slash = mask->vertical_slash;
      if (mask->key_lists) kept.key_lists = mask->key_lists;
      kept.counts = mask->counts;
      kept.fallback = mask->fallback;
      kept.skipped = mask->skipped;
    }
    backend.check(*problem, policy, &kept, e);
    ValidateWorkspace(workspace, workspace_bytes, parts.used() + PrefillScratch(backend, *problem, *policy, kept, e));
    void* scratch = static_cast<std::byte*>(workspace) + parts.used();
    if (backend.prefill) {
      backend.prefill(*problem, *policy, e, kept, *output, scratch);
      return;
    }
    Stopwatch watch;
    backend.select(*problem, *policy, e, kept, scratch);
    const double select_seconds = watch.Lap();
    if (e.guard) RunGuard(backend, *problem, policy, kept, e, scratch);
    const double guard_seconds = watch.Lap();
    backend.attend(*problem, kept, e, *output, scratch);
    if (e.timings) *e.timings = {select_seconds, watch.Lap(), guard_seconds};
  });
}

fp_status fp_audit_workspace(const fp_problem* problem, const fp_block_mask* mask, const fp_exec* exec, size_t* bytes) {
  return Guard([&] {
    ValidateProblem(problem);
    ValidateMask(mask, *problem, false);
    CheckPointer("bytes", bytes);
    const Exec e = ExecOf(exec);
    const Backend& backend = BackendFor(*problem, e);
    backend.check(*problem, nullptr, mask, e);
    if (!e.guard) Refuse("exec.guard", "NULL", "the guard to audit by");
    CheckGuard(backend, *problem, e);
    *bytes = GuardWorkspace(backend, *problem, nullptr, *mask, e);
  });
}

fp_status fp_audit(const fp_problem* problem, fp_block_mask* mask, const fp_exec* exec, void* workspace,
                   size_t workspace_bytes) {
  return Guard([&] {
    ValidateProblem(problem);
    ValidateMask(mask, *problem);
    ValidateVerticalSlash(*mask, *problem);
    ValidateKeyLists(*mask, *problem);
    const Exec e = ExecOf(exec);
    const Backend& backend = BackendFor(*problem, e);
    backend.check(*problem, nullptr, mask, e);
    if (!e.guard) Refuse("exec.guard", "NULL", "the guard to audit by");
    CheckGuard(backend, *problem, e);
    ValidateWorkspace(workspace, workspace_bytes, GuardWorkspace(backend, *problem, nullptr, *mask, e));
    Stopwatch watch;
    RunGuard(backend, *problem, nullptr, *mask, e, workspace);
    if (e.timings) *e.timings = {0, 0, watch.Lap()};
  });
}

fp_status fp_prefill_dense_keys(const fp_policy* policy, int32_t device, const fp_exec* exec, int64_t* keys) {
  return Guard([&] {
    ValidatePolicyAlone(policy);
    CheckPointer("keys", keys);
    if (device != FP_CPU && device != FP_CUDA) Refuse("device", device, "FP_CPU (0) or FP_CUDA (1)");
    Problem p{};
    p.device = device;
    const Exec e = ExecOf(exec);
    const Backend& backend = BackendFor(p, e);
    *keys = backend.dense_keys ? backend.dense_keys(*policy, e) : 0;
  });
}

const char* fp_backend_name(int32_t index) {
  const auto backends = Backends();
  return index >= 0 && static_cast<size_t>(index) < backends.size() ? backends[index]->name : nullptr;
}

int32_t fp_backend_available(const char* backend) {
  int32_t available = 0;
  Guard([&] { available = NamedBackend(backend).available(); });
  return available;
}

size_t fp_backend_describe(const char* backend, char* text, size_t size) {
  size_t length = 0;
  Guard([&] { length = CopyText(NamedBackend(backend).describe(), text, size); });
  return length;
}

size_t fp_backend_targets(const char* backend, char* text, size_t size) {
  size_t length = 0;
  Guard([&] { length = CopyText(Joined(NamedBackend(backend).targets(), " "), text, size); });
  return length;
}

size_t fp_thread_runtime(char* text, size_t size) {
  size_t length = 0;
  Guard([&] { length = CopyText(ThreadRuntime(), text, size); });
  return length;
}

} // extern "C"
