// The CUDA backend: what it can do and where, its scratch memory, and the three verbs as launches on the caller's
// stream. Nothing here allocates device memory or waits for the device.
#include "core/backend.h"

#include "core/error.h"
#include "cuda/attend.h"
#include "cuda/devices.h"
#include "cuda/select.h"

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

// "head_dim is 300; ..." comes from the kernels' own files, which know what they can do.
void Demand(const char* unsupported) {
  if (unsupported) throw Error(FP_UNSUPPORTED, unsupported);
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
  if (policy) Demand(SelectUnsupported(p, *policy));
  if (!policy && mask) Demand(AttendUnsupported(p, *mask, nullptr));
}

cudaStream_t StreamOf(const Exec& exec) { return static_cast<cudaStream_t>(exec.stream); }

size_t SelectWorkspace(const Problem& p, const Policy& policy, const Exec&) {
  Workspace layout(nullptr);
  SelectScratch::Take(layout, p, policy, false);
  return layout.used();
}

void Select(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace) {
  const OnDevice on(p.device_index);
  Workspace layout(workspace);
  const SelectScratch scratch = SelectScratch::Take(layout, p, policy, false);
  CheckCuda(LaunchSelect(p, policy, mask, scratch, false, nullptr, StreamOf(exec)), "select");
}

// Scratch memory of an attend that has to pool K and V itself.
struct AttendScratch {
  void *k_means, *v_means, *scratch;

  static AttendScratch Take(Workspace& workspace, const Problem& p, const BlockMask& mask) {
    AttendScratch a{};
    if (mask.mean_correction) {
      a.k_means = TakeMeans(workspace, p, mask.block_size);
      a.v_means = TakeMeans(workspace, p, mask.block_size);
    }
    a.scratch = workspace.Take<std::byte>(static_cast<int64_t>(AttendScratchBytes()));
    return a;
  }
};

size_t AttendWorkspace(const Problem& p, const BlockMask& mask, const Exec&) {
  Workspace layout(nullptr);
  AttendScratch::Take(layout, p, mask);
  return layout.used();
}

void Attend(const Problem& p, const BlockMask& mask, const Exec& exec, const Output& output, void* workspace) {
  Demand(AttendUnsupported(p, mask, &output));
  const OnDevice on(p.device_index);
  Workspace layout(workspace);
  const AttendScratch scratch = AttendScratch::Take(layout, p, mask);
  if (mask.mean_correction) {
    CheckCuda(LaunchMeans(p, mask, scratch.k_means, scratch.v_means, StreamOf(exec)), "pooling");
  }
  const AttendArgs args{&p, &mask, &output, scratch.k_means, scratch.v_means, scratch.scratch};
  CheckCuda(LaunchAttend(args, StreamOf(exec)), "attend");
}

// Select's own means of K serve the correction too, and V's are pooled in the same pass.
struct PrefillScratch {
  SelectScratch select;
  void* attend;

  static PrefillScratch Take(Workspace& workspace, const Problem& p, const Policy& policy, const BlockMask& mask) {
    PrefillScratch s{};
    s.select = SelectScratch::Take(workspace, p, policy, mask.mean_correction != 0);
    s.attend = workspace.Take<std::byte>(static_cast<int64_t>(AttendScratchBytes()));
    return s;
  }
};

size_t PrefillWorkspace(const Problem& p, const Policy& policy, const BlockMask& mask, const Exec&) {
  Workspace layout(nullptr);
  PrefillScratch::Take(layout, p, policy, mask);
  return layout.used();
}

void Prefill(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, const Output& output,
             void* workspace) {
  Demand(AttendUnsupported(p, mask, &output));
  const OnDevice on(p.device_index);
  Workspace layout(workspace);
  const PrefillScratch scratch = PrefillScratch::Take(layout, p, policy, mask);
  const bool correction = mask.mean_correction != 0;
  CheckCuda(
      LaunchSelect(p, policy, mask, scratch.select, correction, static_cast<int*>(scratch.attend), StreamOf(exec)),
      "select");
  const AttendArgs args{&p,
                        &mask,
                        &output,
                        correction ? scratch.select.k_means : nullptr,
                        correction ? scratch.select.v_means : nullptr,
                        scratch.attend,
                        true};
  CheckCuda(LaunchAttend(args, StreamOf(exec)), "attend");
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
                                     cuda::Prefill};

} // namespace flashprefill
