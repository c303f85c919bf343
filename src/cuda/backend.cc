// The CUDA backend: its devices and limits, its scratch memory, and the three verbs as launches on the caller's stream.
// Nothing here allocates device memory or waits for the device. A method's launches are its Selector's.
#include "core/backend.h"

#include <algorithm>
#include <functional>
#include <optional>

#include "core/error.h"
#include "core/method.h"
#include "cuda/common/attend/plan.h"
#include "cuda/common/energies/forced.h"
#include "cuda/common/keys/key_copy.h"
#include "cuda/devices.h"
#include "cuda/guard.h"
#include "cuda/selector.h"

namespace flashprefill {
namespace cuda {
namespace {

bool Available() {
  for (const Device& device : AllDevices().all) {
    if (device.supported()) return true;
  }
  return false;
}

// Which kernels a device runs, and why.
std::string KernelsOf(const Device& device) {
  if (device.hopper()) return "target sm90a, Hopper's own kernels";
  if (device.major < 8) return "not supported, it needs compute capability 8.0 (Ampere) or later";
  if (!device.supported()) return "not supported, a thread block has less than 99 KiB of shared memory";
  return "target portable, the kernels for every GPU since Ampere, with " + std::to_string(device.shared_bytes / 1024) +
         " KiB of shared memory";
}

std::string Describe() {
  const Devices& devices = AllDevices();
  if (devices.all.empty()) return devices.why_none;
  std::string text;
  for (const Device& device : devices.all) {
    text += (text.empty() ? "" : ", ") + device.name + " (" + device.arch() + ": " + KernelsOf(device) + ")";
  }
  return text;
}

// Of all devices together, so that a name may be refused later, by Check, for the one that a call is for.
std::vector<std::string> Targets() {
  std::vector<std::string> names;
  for (const Device& device : AllDevices().all) {
    for (const std::string& name : TargetsOf(device)) {
      if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
    }
  }
  return names;
}

// The text comes from the kernels' own files, which know their limits.
void Demand(const char* unsupported) {
  if (unsupported) throw Error(FP_UNSUPPORTED, unsupported);
}

// Without anything to score, as with a share of 1, every method is the same.
constexpr Selector kForcedBlocks = ForcedSelector();

const Selector& SelectorFor(const Policy& policy) {
  if (flashprefill::KeepsEverything(policy)) return kForcedBlocks;
  const Selector* selector = SelectorOf(policy);
  if (!selector) throw Error(FP_UNSUPPORTED, "this policy selects on the CPU only");
  return *selector;
}

const Device& DeviceOf(const Problem& p) { return AllDevices().all[static_cast<size_t>(p.device_index)]; }
Gpu GpuOf(const Problem& p, const Exec& exec) { return Gpu::Of(DeviceOf(p), exec.target); }

void DemandSupported(const Device& device, int index) {
  if (device.supported()) return;
  throw Error(FP_UNSUPPORTED,
              "GPU " + std::to_string(index) + " is " + device.name + ", " + device.arch() + ": " + KernelsOf(device));
}

// The problem as kernels get it: FP8 keys and values in 16 bits, in scratch memory, by a pass that goes before all
// others. of_v: the call reads V.
class InSixteenBits {
 public:
  InSixteenBits(const Problem& given, bool of_v, Workspace& workspace) : given_(given), p_(given) {
    if (!HasFp8(given)) return;
    copy_ = KeyCopy::Take(workspace, given, of_v);
    p_ = copy_->Over(given);
  }
  const Problem& problem() const { return p_; }
  void Launch(const Exec& exec) const {
    if (copy_) CheckCuda(LaunchKeyCopy(given_, *copy_, static_cast<cudaStream_t>(exec.stream)), "the copy of FP8 keys");
  }

 private:
  const Problem& given_;
  Problem p_;
  std::optional<KeyCopy> copy_;
};

void Check(const Problem& given, const Policy* policy, const BlockMask* mask, const Exec& exec) {
  const std::vector<Device>& devices = AllDevices().all;
  const Problem p = HasFp8(given) ? KeyCopy().Over(given) : given;
  if (p.device_index < 0 || p.device_index >= static_cast<int>(devices.size())) {
    Refuse("device_index", p.device_index, "from 0 to " + std::to_string(static_cast<int>(devices.size()) - 1));
  }
  const Device& device = DeviceOf(p);
  DemandSupported(device, p.device_index);
  if (exec.target) {
    const std::vector<std::string> targets = TargetsOf(device);
    if (std::find(targets.begin(), targets.end(), exec.target) == targets.end()) {
      Refuse("exec.target", exec.target, "one that " + device.name + " has: " + Joined(targets, " "));
    }
  }
  const Gpu gpu = GpuOf(p, exec);
  const int32_t correction = mask ? mask->mean_correction : policy ? policy->mean_correction : FP_NO_CORRECTION;
  if (correction == FP_SUMMARY_KEYS) {
    Refuse("mean_correction", correction, "FP_NO_CORRECTION (0) or FP_BLOCK_MEANS (1) on CUDA: the CPU has it",
           FP_UNSUPPORTED);
  }
  const auto half = [](int32_t dtype) { return dtype == FP_BF16 || dtype == FP_F16; };
  if (!half(p.q.dtype)) Refuse("q.dtype", p.q.dtype, "FP_BF16 (1) or FP_F16 (2) on CUDA", FP_UNSUPPORTED);
  const auto same = [&](const char* name, int32_t dtype) {
    if (dtype == p.q.dtype || dtype == FP_E4M3) return;
    Refuse(name, dtype, "q's (" + std::to_string(p.q.dtype) + ") or FP_E4M3 (3) on CUDA", FP_UNSUPPORTED);
  };
  same("k.dtype", given.k.dtype);
  same("v.dtype", given.v.dtype);
  if (HasFp8(given)) Demand(UnsupportedFp8(given));
  if (policy && !p.causal && !SelectorFor(*policy).without_causal) {
    Refuse("causal", 0, "1 with this policy on CUDA: it does not select without causality there", FP_UNSUPPORTED);
  }
  if (p.final_chunks && policy && p.batch > kMaxFinalChunks) {
    SelectorFor(*policy); // first: whether there is one at all
    Demand("final_chunks is given for more than 4096 sequences");
  }
  if (exec.guard) DeviceGuard::Check(p, policy, *exec.guard);
  if (policy) Demand(SelectorFor(*policy).unsupported(p, *policy, gpu));
  if (!policy && mask) Demand(AttendPlan::Of(p, *mask, gpu, exec.math).Unsupported(nullptr));
}

cudaStream_t StreamOf(const Exec& exec) { return static_cast<cudaStream_t>(exec.stream); }

size_t SelectWorkspace(const Problem& given, const Policy& policy, const Exec& exec) {
  Workspace layout(nullptr);
  const InSixteenBits keys(given, false, layout);
  const Problem& p = keys.problem();
  SelectorFor(policy).select(p, policy, GpuOf(p, exec), false, layout, nullptr);
  return layout.used();
}

void Select(const Problem& given, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace) {
  const OnDevice on(given.device_index);
  Workspace layout(workspace);
  const InSixteenBits keys(given, false, layout);
  const Problem& p = keys.problem();
  keys.Launch(exec);
  const SelectTarget target{mask, StreamOf(exec)};
  SelectorFor(policy).select(p, policy, GpuOf(p, exec), false, layout, &target);
}

// Scratch memory of an attend that has to pool K and V itself.
Means TakeForAttend(Workspace& workspace, const Problem& p, const BlockMask& mask, AttendPlan& attend) {
  attend.Take(workspace);
  const bool correction = mask.mean_correction != 0;
  return TakeMeans(workspace, p, mask.block_size, correction, correction);
}

size_t AttendWorkspace(const Problem& given, const BlockMask& mask, const Exec& exec) {
  Workspace layout(nullptr);
  const InSixteenBits keys(given, true, layout);
  const Problem& p = keys.problem();
  AttendPlan attend = AttendPlan::Of(p, mask, GpuOf(p, exec), exec.math);
  TakeForAttend(layout, p, mask, attend);
  return layout.used();
}

void Attend(const Problem& given, const BlockMask& mask, const Exec& exec, const Output& output, void* workspace) {
  Workspace layout(workspace);
  const InSixteenBits keys(given, true, layout);
  const Problem& p = keys.problem();
  AttendPlan attend = AttendPlan::Of(p, mask, GpuOf(p, exec), exec.math);
  Demand(attend.Unsupported(&output));
  const OnDevice on(p.device_index);
  keys.Launch(exec);
  const Means means = TakeForAttend(layout, p, mask, attend);
  if (means.k) {
    const TileRules rules = TileRules::Of(Geometry::Of(p, mask));
    CheckCuda(LaunchMeans(DeviceProblem::Of(p), rules, means, false, StreamOf(exec)), "pooling");
  }
  CheckCuda(attend.Launch(output, means, false, true, StreamOf(exec)), "attend");
}

// Scratch memory of prefill's selection, and of a guard's, which makes the same means at the same place.
void TakeSelection(Workspace& workspace, const Problem& p, const Policy& policy, const DeviceGuard* guard,
                   const Gpu& gpu, bool correction) {
  Workspace again = workspace;
  SelectorFor(policy).select(p, policy, gpu, correction, workspace, nullptr);
  if (!guard || !guard->larger()) return;
  SelectorFor(*guard->larger()).select(p, *guard->larger(), gpu, correction, again, nullptr);
  if (again.used() > workspace.used()) workspace = again;
}

size_t PrefillWorkspace(const Problem& given, const Policy& policy, const BlockMask& mask, const Exec& exec) {
  Workspace layout(nullptr);
  const InSixteenBits keys(given, true, layout);
  const Problem& p = keys.problem();
  const Gpu gpu = GpuOf(p, exec);
  AttendPlan attend = AttendPlan::Of(p, mask, gpu, exec.math);
  attend.Take(layout);
  std::optional<DeviceGuard> guard;
  if (exec.guard) guard.emplace(p, &policy, mask, gpu, exec).Take(layout);
  TakeSelection(layout, p, policy, guard ? &*guard : nullptr, gpu, mask.mean_correction != 0);
  return layout.used();
}

// Whether tiles may keep very unequal numbers of blocks: for their scores, or in a dense tail behind a long prefix.
bool Uneven(const Problem& p, const Policy& policy, const Selector& selector, int dense_up_to_keys) {
  if (flashprefill::KeepsEverything(policy) || p.max_seqlen_k <= dense_up_to_keys) return false;
  const bool tail = policy.dense_tail_blocks > 0 && (p.final_chunks || p.final_chunk);
  return selector.scores || (tail && p.max_seqlen_k > p.max_seqlen_q);
}

// Select's own means of K serve the correction too, and V's are pooled in the same pass.
void Prefill(const Problem& given, const Policy& policy, const Exec& exec, BlockMask& mask, const Output& output,
             void* workspace) {
  Workspace layout(workspace);
  const InSixteenBits keys(given, true, layout);
  const Problem& p = keys.problem();
  const Gpu gpu = GpuOf(p, exec);
  AttendPlan attend = AttendPlan::Of(p, mask, gpu, exec.math);
  Demand(attend.Unsupported(&output));
  const OnDevice on(p.device_index);
  keys.Launch(exec);
  attend.Take(layout);
  std::optional<DeviceGuard> guard;
  if (exec.guard) guard.emplace(p, &policy, mask, gpu, exec).Take(layout);
  const Selector& selector = SelectorFor(policy);
  const bool correction = mask.mean_correction != 0;
  const int dense_up_to_keys = selector.dense_up_to_keys ? selector.dense_up_to_keys(gpu) : 0;
  const auto select = [&](const Policy& by, BlockMask& to) {
    Workspace scratch = layout;
    const SelectTarget target{to, StreamOf(exec), {attend.counter(), dense_up_to_keys}};
    return SelectorFor(by).select(p, by, gpu, correction, scratch, &target);
  };
  const Means means = select(policy, mask);
  if (guard) guard->Run(StreamOf(exec), std::cref(select)); // a reference: std::function would copy to the heap
  const bool uneven = Uneven(p, policy, selector, dense_up_to_keys) || (guard && guard->changes_mask());
  // Select has set the counter to zero, and a guard's launches leave it alone and wait for one another.
  const auto rest = guard ? guard->Rest(StreamOf(exec)) : std::function<cudaError_t()>();
  CheckCuda(attend.Launch(output, means, true, uneven, StreamOf(exec), rest), "attend");
}

size_t GuardWorkspace(const Problem& given, const BlockMask& mask, const Exec& exec) {
  Workspace layout(nullptr);
  const InSixteenBits keys(given, false, layout);
  DeviceGuard(keys.problem(), nullptr, mask, GpuOf(given, exec), exec).Take(layout);
  return layout.used();
}

// Of a mask that somebody gave: no budget to enlarge.
void Guard(const Problem& given, BlockMask& mask, const Exec& exec, void* workspace) {
  const OnDevice on(given.device_index);
  Workspace layout(workspace);
  const InSixteenBits keys(given, false, layout);
  keys.Launch(exec);
  DeviceGuard guard(keys.problem(), nullptr, mask, GpuOf(given, exec), exec);
  guard.Take(layout);
  guard.Run(StreamOf(exec), nullptr);
  if (const auto rest = guard.Rest(StreamOf(exec))) CheckCuda(rest(), "guard");
}

// Of the current device, since no problem names one.
int64_t DenseKeys(const Policy& policy, const Exec& exec) {
  int current = 0;
  CheckCuda(cudaGetDevice(&current), "the current device");
  const Device& device = AllDevices().all.at(static_cast<size_t>(current));
  DemandSupported(device, current);
  const Selector& selector = SelectorFor(policy);
  return selector.dense_up_to_keys ? selector.dense_up_to_keys(Gpu::Of(device, exec.target)) : 0;
}

} // namespace
} // namespace cuda

extern const Backend kCudaBackend = {"cuda",
                                     FP_CUDA,
                                     1,
                                     cuda::Available,
                                     cuda::Describe,
                                     cuda::Targets,
                                     cuda::Check,
                                     cuda::SelectWorkspace,
                                     cuda::AttendWorkspace,
                                     cuda::Select,
                                     cuda::Attend,
                                     cuda::PrefillWorkspace,
                                     cuda::Prefill,
                                     cuda::DenseKeys,
                                     nullptr, // the guard is the device's
                                     nullptr,
                                     cuda::GuardWorkspace,
                                     cuda::Guard};

} // namespace flashprefill
