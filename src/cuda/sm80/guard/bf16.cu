// The guard's audit for bf16.
#include "cuda/sm80/guard/audit.cuh"

namespace flashprefill::cuda {

template <>
GuardAuditPlan GuardAudit<__nv_bfloat16>(int head_dim, bool many_rows) {
  if (head_dim <= 64) return GuardAuditOf<__nv_bfloat16, 64>(many_rows);
  if (head_dim <= 128) return GuardAuditOf<__nv_bfloat16, 128>(many_rows);
  return GuardAuditOf<__nv_bfloat16, 256>(many_rows);
}

} // namespace flashprefill::cuda
