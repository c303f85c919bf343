// The guard's audit, for every GPU since Ampere.
#include "cuda/common/guard/audit.cuh"
#include "cuda/sm80/panel_product.cuh"

namespace flashprefill::cuda {

cudaError_t LaunchGuardAuditPortable(const GuardArgs& args, cudaStream_t stream) {
  return args.d.p.q.dtype == FP_BF16 ? LaunchGuardAuditOf<PanelProductPortable, true, __nv_bfloat16>(args, stream)
                                     : LaunchGuardAuditOf<PanelProductPortable, true, __half>(args, stream);
}

} // namespace flashprefill::cuda
