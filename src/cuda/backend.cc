// The CUDA backend: its devices and limits, its scratch memory, and the three verbs as launches on the caller's stream.
// Nothing here allocates device memory or waits for the device. A method's launches are its Selector's.
#include "core/backend.h"

#include "core/error.h"
#include "core/method.h"
#include "cuda/devices.h"
#include "cuda/selector.h"
#include "cuda/sm90/attend/plan.h"
#include "cuda/sm90/energies/forced.h"

namespace flashprefill {
namespace cuda {
namespace {

bool Available() {
  for (const Device& device : AllDevices().all) {
    if (device.supported()) return true;
  }
  return false;
}

std::string Describe() {
  const Devices& devices = AllDevices();
  if (devices.all.empty()) return devices.why_none;
  std::string text;
  for (const Device& device : devices.all) {
    text += (text.empty() ? "" : ", ") + device.name + " (" + device.arch() +
            (device.supported() ? ")" : ": only sm_90 is built)");
  }
  return text;
}

std::vector<std::string> Targets() { return {}; }

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

void Check(const Problem& p, const Policy* policy, const BlockMask* mask, const Exec&) {
  const std::vector<Device>& devices = AllDevices().all;
  if (p.device_index < 0 || p.device_index >= static_cast<int>(devices.size())) {
    Refuse("device_index", p.device_index, "from 0 to " + std::to_string(static_cast<int>(devices.size()) - 1));
  }
  const Device& device = devices[static_cast<size_t>(p.device_index)];
  if (!device.supported()) {
    throw Error(FP_UNSUPPORTED, "GPU " + std::to_string(p.device_index) + " is " + device.name + ", " + device.arch() +
                                    "; only sm_90 (Hopper: H100, H200, GH200) is built");
  }
  const auto half = [](int32_t dtype) { return dtype == FP_BF16 || dtype == FP_F16; };
  if (!half(p.q.dtype)) Refuse("q.dtype", p.q.dtype, "FP_BF16 (1) or FP_F16 (2) on CUDA", FP_UNSUPPORTED);
  const auto same = [&](const char* name, int32_t dtype) {
    if (dtype != p.q.dtype) Refuse(name, dtype, "q's (" + std::to_string(p.q.dtype) + ") on CUDA", FP_UNSUPPORTED);
  };
  same("k.dtype", p.k.dtype);
  same("v.dtype", p.v.dtype);
  if (p.final_chunks && policy && p.batch > kMaxFinalChunks) {
    SelectorFor(*policy); // first: whether there is one at all
    Demand("final_chunks is given for more than 4096 sequences");
  }
  if (policy) Demand(SelectorFor(*policy).unsupported(p, *policy));
  if (!policy && mask) Demand(AttendPlan::Of(p, *mask).Unsupported(nullptr));
}

cudaStream_t StreamOf(const Exec& exec) { return static_cast<cudaStream_t>(exec.stream); }

size_t SelectWorkspace(const Problem& p, const Policy& policy, const Exec&) {
  Workspace layout(nullptr);
  SelectorFor(policy).select(p, policy, false, layout, nullptr);
  return layout.used();
}

void Select(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace) {
  const OnDevice on(p.device_index);
  Workspace layout(workspace);
  const SelectTarget target{mask, StreamOf(exec)};
  SelectorFor(policy).select(p, policy, false, layout, &target);
}

// Scratch memory of an attend that has to pool K and V itself.
Means TakeForAttend(Workspace& workspace, const Problem& p, const BlockMask& mask, AttendPlan& attend) {
  attend.Take(workspace);
  const bool correction = mask.mean_correction != 0;
  return TakeMeans(workspace, p, mask.block_size, correction, correction);
}

size_t AttendWorkspace(const Problem& p, const BlockMask& mask, const Exec&) {
  Workspace layout(nullptr);
  AttendPlan attend = AttendPlan::Of(p, mask);
  TakeForAttend(layout, p, mask, attend);
  return layout.used();
}

void Attend(const Problem& p, const BlockMask& mask, const Exec& exec, const Output& output, void* workspace) {
  AttendPlan attend = AttendPlan::Of(p, mask);
  Demand(attend.Unsupported(&output));
  const OnDevice on(p.device_index);
  Workspace layout(workspace);
  const Means means = TakeForAttend(layout, p, mask, attend);
  if (means.k) {
    const TileRules rules = TileRules::Of(Geometry::Of(p, mask));
    CheckCuda(LaunchMeans(DeviceProblem::Of(p), rules, means, false, StreamOf(exec)), "pooling");
  }
  CheckCuda(attend.Launch(output, means, false, true, StreamOf(exec)), "attend");
}

size_t PrefillWorkspace(const Problem& p, const Policy& policy, const BlockMask& mask, const Exec&) {
  Workspace layout(nullptr);
  AttendPlan attend = AttendPlan::Of(p, mask);
  attend.Take(layout);
  SelectorFor(policy).select(p, policy, mask.mean_correction != 0, layout, nullptr);
  return layout.used();
}

// Whether tiles may keep very unequal numbers of blocks: for their scores, or in a dense tail behind a long prefix.
bool Uneven(const Problem& p, const Policy& policy, const Selector& selector) {
  if (flashprefill::KeepsEverything(policy) || p.max_seqlen_k <= selector.dense_up_to_keys) return false;
  const bool tail = policy.dense_tail_blocks > 0 && (p.final_chunks || p.final_chunk);
  return selector.scores || (tail && p.max_seqlen_k > p.max_seqlen_q);
}

// Select's own means of K serve the correction too, and V's are pooled in the same pass.
void Prefill(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, const Output& output,
             void* workspace) {
  AttendPlan attend = AttendPlan::Of(p, mask);
  Demand(attend.Unsupported(&output));
  const OnDevice on(p.device_index);
  Workspace layout(workspace);
  attend.Take(layout);
  const Selector& selector = SelectorFor(policy);
  const SelectTarget target{mask, StreamOf(exec), {attend.counter(), selector.dense_up_to_keys}};
  const Means means = selector.select(p, policy, mask.mean_correction != 0, layout, &target);
  CheckCuda(attend.Launch(output, means, true, Uneven(p, policy, selector), StreamOf(exec)), "attend");
}

int64_t DenseKeys(const Policy& policy) { return SelectorFor(policy).dense_up_to_keys; }

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
                                     cuda::DenseKeys};

} // namespace flashprefill
