// The guard: draws rows, has a backend audit them, and repairs the mask before anything is attended to. See fp_guard
// and docs/guard.md. It knows no method: what a larger budget is, a method's fields say (core/budget.cc).
#ifndef FLASHPREFILL_CORE_GUARD_H_
#define FLASHPREFILL_CORE_GUARD_H_

#include "core/backend.h"
#include "core/guard_math.h"
#include "core/types.h"

namespace flashprefill {

// Rows that are audited of a sequence and head, if its mask leaves something out of as many.
int64_t GuardRows(const Problem& p, const fp_guard& guard, const Sequence& s);

// Rows whose tile leaves something out.
int64_t SparseRows(const Problem& p, const BlockMask& mask, const Sequence& s, int64_t mask_head);

// The rows that are drawn for a head, written to `rows`; `draw` numbers the audits of a call. Returns how many;
// *sparse becomes the number of rows whose tile leaves something out.
int64_t DrawRows(const Problem& p, const BlockMask& mask, const fp_guard& guard, const Sequence& s, int32_t head,
                 int draw, AuditRow* rows, int64_t* sparse);

// What the rows of a head say about it.
struct HeadAudit {
  double recall = 1, low = 1, p05 = 1;
  int64_t rows = 0, sparse = 0; // audited, of so many whose tile leaves something out
  int32_t missed_block = -1;
  bool is_low = false;
};

// `sparse` rows have been cut into rows.size() strata. `scratch` has room for as many floats.
HeadAudit Summarise(std::span<const AuditRow> rows, int64_t sparse, double target, float* scratch);

Moments MomentsOf(std::span<const AuditRow> rows);

// Scratch memory of RunGuard. Without a policy the mask is one that somebody gave.
size_t GuardWorkspace(const Backend& backend, const Problem& p, const Policy* policy, const BlockMask& mask,
                      const Exec& exec);
// Audits a mask by exec's guard, repairs it, and writes the guard's results. A backend with a guard of its own does
// that itself.
void RunGuard(const Backend& backend, const Problem& p, const Policy* policy, BlockMask& mask, const Exec& exec,
              void* workspace);

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_GUARD_H_
