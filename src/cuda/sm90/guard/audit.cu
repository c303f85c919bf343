// The guard's audit, for Hopper.
#include "cuda/common/guard/audit.cuh"
#include "cuda/sm90/panel_product.cuh"

namespace flashprefill::cuda {

cudaError_t LaunchGuardAuditSm90(const GuardArgs& args, cudaStream_t stream) {
  return args.d.p.q.dtype == FP_BF16 ? LaunchGuardAuditOf<PanelProductSm90, false, __nv_bfloat16>(args, stream)
                                     : LaunchGuardAuditOf<PanelProductSm90, false, __half>(args, stream);
}

} // namespace flashprefill::cuda
