// The order of a guard's launches. See guard.h.
#include "cuda/guard.h"

#include "core/error.h"
#include "core/mask_memory.h"
#include "cuda/devices.h"

namespace flashprefill::cuda {
namespace {

constexpr double kRepairFactor = 4; // of the budget

} // namespace

DeviceGuard::DeviceGuard(const Problem& p, const Policy* policy, const BlockMask& mask, const Gpu& gpu,
                         const Exec& exec)
    : p_(p),
      given_(policy),
      guard_(*exec.guard),
      plan_(
          GuardPlan::Of(p, mask, *exec.guard, gpu, AllDevices().all[static_cast<size_t>(p.device_index)].processors)) {
  if (guard_.mode != FP_GUARD_REPAIR || !policy || KeepsEverything(*policy)) return;
  reselects_ = WithBudget(*policy, 0, p.q_heads, kRepairFactor, reinterpret_cast<Policy&>(policy_), tables_);
}

void DeviceGuard::Check(const Problem& p, const Policy* policy, const fp_guard& guard) {
  if (guard.levels) {
    Refuse("guard.levels", "given", "NULL on CUDA, where all heads are selected for by one budget", FP_UNSUPPORTED);
  }
  if (policy && guard.mode == FP_GUARD_REPAIR && TableWords(*policy, p.q_heads) > kMostTableWords) {
    Refuse("guard.mode", "FP_GUARD_REPAIR (1)",
           "another for a policy whose tables have more than " + std::to_string(kMostTableWords) + " numbers on CUDA",
           FP_UNSUPPORTED);
  }
}

void DeviceGuard::Take(Workspace& workspace) {
  plan_.Take(workspace);
  if (reselects_) more_ = MaskIn(workspace, p_, *given_);
}

void DeviceGuard::Run(cudaStream_t stream, const std::function<void(const Policy&, BlockMask&)>& select) {
  CheckCuda(plan_.LaunchAudit(0, stream), "guard");
  if (!changes_mask()) return;
  const int low = reselects_ ? FP_GUARD_REPAIRED : FP_GUARD_DENSE;
  CheckCuda(plan_.LaunchReport(0, low, stream), "guard");
  if (reselects_) {
    CheckCuda(plan_.LaunchJoinMissed(stream), "guard");
    select(*larger(), more_);
    CheckCuda(plan_.LaunchAdopt(more_, stream), "guard");
  } else {
    CheckCuda(plan_.LaunchKeepAll(stream), "guard");
  }
  CheckCuda(plan_.LaunchAudit(1, stream), "guard");
  CheckCuda(plan_.LaunchReport(1, low, stream), "guard");
}

std::function<cudaError_t()> DeviceGuard::Rest(cudaStream_t stream) const {
  if (changes_mask()) return {};
  return [this, stream] { return plan_.LaunchReport(0, FP_GUARD_LOW, stream); };
}

} // namespace flashprefill::cuda
