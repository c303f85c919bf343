// The guard's run over one mask on a GPU: which launches follow which (core/guard.cc does the same on the host, where
// it can look at what was found). Plain C++.
#ifndef FLASHPREFILL_CUDA_GUARD_H_
#define FLASHPREFILL_CUDA_GUARD_H_

#include <functional>

#include "core/method.h"
#include "cuda/common/guard/plan.h"

namespace flashprefill::cuda {

class DeviceGuard {
 public:
  // Without a policy the mask is one that somebody gave. All of them, and exec.guard, outlive the guard.
  DeviceGuard(const Problem& p, const Policy* policy, const BlockMask& mask, const Gpu& gpu, const Exec& exec);

  // What is not done on CUDA, by name: throws Error.
  static void Check(const Problem& p, const Policy* policy, const fp_guard& guard);

  void Take(Workspace& workspace);

  // The policy that a repair selects by; null where heads that keep too little keep everything. It lives as long as the
  // guard.
  const Policy* larger() const { return reselects_ ? reinterpret_cast<const Policy*>(policy_) : nullptr; }

  bool changes_mask() const { return guard_.mode != FP_GUARD_OBSERVE; }

  // Puts the guard on the stream, but for a report that nothing waits for. select(policy, mask): a selection for all
  // heads, on the same stream.
  void Run(cudaStream_t stream, const std::function<void(const Policy&, BlockMask&)>& select);
  // That report, which is to follow, if there is one.
  std::function<cudaError_t()> Rest(cudaStream_t stream) const;

 private:
  static constexpr int64_t kMostTableWords = 1024; // of a policy's tables

  const Problem& p_;
  const Policy* const given_;
  const fp_guard& guard_;
  GuardPlan plan_;
  bool reselects_ = false;
  alignas(8) std::byte policy_[kMostPolicyBytes];
  int32_t tables_[kMostTableWords];
  BlockMask more_{}; // of the repair's selection
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_GUARD_H_
