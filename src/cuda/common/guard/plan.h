// The guard on a GPU, from the host's side: shapes, scratch memory and launches. Plain C++. An audit is three launches,
// four for a mask with key lists, and reads nothing back: where nothing keeps too little, the second audit's launches
// and those of a repair find that out from device memory and end.
#ifndef FLASHPREFILL_CUDA_COMMON_GUARD_PLAN_H_
#define FLASHPREFILL_CUDA_COMMON_GUARD_PLAN_H_

#include "core/backend.h"
#include "cuda/common/guard/args.h"
#include "cuda/devices.h"

namespace flashprefill::cuda {

class GuardPlan {
 public:
  // processors: the GPU's. The mask is fit to be attended to on CUDA (AttendPlan::Unsupported).
  static GuardPlan Of(const Problem& p, const BlockMask& mask, const fp_guard& guard, const Gpu& gpu, int processors);

  void Take(Workspace& workspace);

  // What rows of all heads keep, and what that says of the heads. draw: 0, and 1 after a repair, which is reported in
  // place of the first. low_outcome: fp_guard_outcome of heads that keep too little.
  cudaError_t LaunchAudit(int draw, cudaStream_t stream) const;
  cudaError_t LaunchReport(int draw, int low_outcome, cudaStream_t stream) const;
  // What becomes of these heads: they keep everything; or what they miss most, and what `more` keeps.
  cudaError_t LaunchKeepAll(cudaStream_t stream) const;
  cudaError_t LaunchJoinMissed(cudaStream_t stream) const;
  cudaError_t LaunchAdopt(const BlockMask& more, cudaStream_t stream) const;

 private:
  GuardArgs args_;
  bool portable_ = false;
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_GUARD_PLAN_H_
