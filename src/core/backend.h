// The interface of a backend: a row of function pointers. CMake collects the folders of src/ that call
// flashprefill_add_backend(NAME ...) and writes the table of them, so a new backend adds files and changes no code. A
// backend defines `extern const Backend kNAMEBackend` and may rely on everything that core/validate.cc checked.
#ifndef FLASHPREFILL_CORE_BACKEND_H_
#define FLASHPREFILL_CORE_BACKEND_H_

#include <span>
#include <string>
#include <vector>

#include "core/types.h"

namespace flashprefill {

// One row of queries whose softmax a guard computes exactly.
struct AuditRow {
  int32_t sequence, head, row; // query head; row of the sequence
  int32_t missed_block;        // result: of the blocks left out the heaviest; -1: nothing was missed
  float missed;                // result: its share of the softmax, without what verticals, slashes or lists keep of it
  float recall;                // result: the share of the softmax that the mask keeps; 1 for a row that sees nothing
};

struct Backend {
  const char* name; // as the user writes it
  int32_t device;   // fp_device whose memory it works on
  int32_t rank;     // among the backends of a device the available one with the highest rank is the default
  bool (*available)();
  std::string (*describe)();             // one line; if it is not available, why not
  std::vector<std::string> (*targets)(); // instruction sets on this machine, best first; empty if there is no choice
  // Throws Error(FP_UNSUPPORTED), which names it, for a valid call that this backend does not do. Called before the
  // functions below.
  void (*check)(const Problem&, const Policy*, const BlockMask*, const Exec&);
  // Scratch memory. Masks come without their bits here.
  size_t (*select_workspace)(const Problem&, const Policy&, const Exec&);
  size_t (*attend_workspace)(const Problem&, const BlockMask&, const Exec&);
  void (*select)(const Problem&, const Policy&, const Exec&, BlockMask&, void* workspace);
  void (*attend)(const Problem&, const BlockMask&, const Exec&, const Output&, void* workspace);
  // Both in one call, if they can share work; null: select, then attend, over the same scratch memory.
  size_t (*prefill_workspace)(const Problem&, const Policy&, const BlockMask&, const Exec&);
  void (*prefill)(const Problem&, const Policy&, const Exec&, BlockMask&, const Output&, void* workspace);
  // Keys up to which prefill keeps everything, because a selection would not pay; null: it always selects.
  int64_t (*dense_keys)(const Policy&, const Exec&);
  // Fills in what the mask keeps of these rows of queries, by sequence and head in order; null: no guard works here, or
  // one of the backend's own.
  size_t (*audit_workspace)(const Problem&, const BlockMask&, const Exec&, int64_t rows);
  void (*audit)(const Problem&, const BlockMask&, const Exec&, std::span<AuditRow> rows, void* workspace);
  // The guard of a mask that somebody gave, where core cannot look at what it finds (core/guard.h); prefill has its
  // own.
  size_t (*guard_workspace)(const Problem&, const BlockMask&, const Exec&) = nullptr;
  void (*guard)(const Problem&, BlockMask&, const Exec&, void* workspace) = nullptr;
};

// All of this build, in no order.
std::span<const Backend* const> Backends();

// The backend that exec names, or the best available one for the problem's memory. Refuses what is not there.
const Backend& BackendFor(const Problem& p, const Exec& exec);
const Backend& NamedBackend(const char* name);

// Cuts a workspace into aligned parts. With a null base it only adds up sizes, so that the query and the call share
// code.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<std::byte*>(base)) {}

  template <typename T>
  T* Take(int64_t count) {
    T* part = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += DivUp(static_cast<size_t>(count) * sizeof(T), kWorkspaceAlign) * kWorkspaceAlign;
    return part;
  }
  size_t used() const { return used_; }

 private:
  std::byte* base_;
  size_t used_ = 0;
};

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_BACKEND_H_
