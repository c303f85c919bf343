// The guard's audit for fp16.
#include "cuda/sm80/guard/audit.cuh"

namespace flashprefill::cuda {

template <>
GuardAuditPlan GuardAudit<__half>(int head_dim, bool many_rows) {
  if (head_dim <= 64) return GuardAuditOf<__half, 64>(many_rows);
  if (head_dim <= 128) return GuardAuditOf<__half, 128>(many_rows);
  return GuardAuditOf<__half, 256>(many_rows);
}

} // namespace flashprefill::cuda
