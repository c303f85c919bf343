// The launch of the guard's audit: a CTA per sequence, KV head, tile of audited rows and piece of keys.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/launch.h"
#include "cuda/sm80/guard/audit_plan.cuh"

namespace flashprefill::cuda {

template <>
GuardAuditPlan GuardAudit<__nv_bfloat16>(int head_dim, bool many_rows);
template <>
GuardAuditPlan GuardAudit<__half>(int head_dim, bool many_rows);

cudaError_t LaunchGuardAudit(const GuardArgs& args, cudaStream_t stream) {
  const Problem& p = args.d.p;
  const bool many = args.tile_rows == GuardRowsPerWarp(p.head_dim) * kGuardManyWarps;
  const GuardAuditPlan plan =
      p.q.dtype == FP_BF16 ? GuardAudit<__nv_bfloat16>(p.head_dim, many) : GuardAudit<__half>(p.head_dim, many);
  if (cudaError_t e = AllowSharedOnly(plan.kernel, plan.bytes)) return e;
  const int64_t grid = int64_t{p.batch} * p.kv_heads * args.row_tiles * args.pieces;
  return LaunchOverlapped(plan.kernel, true, grid, plan.threads, plan.bytes, stream, args);
}

} // namespace flashprefill::cuda
