#include "cuda/devices.h"

#include "core/error.h"

namespace flashprefill::cuda {
namespace {

Devices Find() {
  Devices devices;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    cudaGetLastError(); // not an error of the next call
    int driver = 0;
    const bool no_driver = cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0;
    devices.why_none = no_driver                              ? "no NVIDIA driver"
                       : error == cudaSuccess                 ? "no NVIDIA GPU"
                       : error == cudaErrorNoDevice           ? "no NVIDIA GPU"
                       : error == cudaErrorInsufficientDriver ? "the NVIDIA driver is older than this build's CUDA"
                                                              : std::string("CUDA says: ") + cudaGetErrorString(error);
    return devices;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) {
      devices.all.push_back({"an unreadable GPU"});
    } else {
      devices.all.push_back({properties.name, properties.major, properties.minor,
                             static_cast<int>(properties.sharedMemPerBlockOptin),
                             static_cast<int>(properties.sharedMemPerMultiprocessor), properties.multiProcessorCount,
                             properties.l2CacheSize});
    }
  }
  return devices;
}

} // namespace

const Devices& AllDevices() {
  static const Devices devices = Find();
  return devices;
}

std::vector<std::string> TargetsOf(const Device& device) {
  std::vector<std::string> targets;
  if (!device.supported()) return targets;
  if (device.hopper()) targets.push_back("sm90a");
  targets.push_back("portable");
  if (device.shared_bytes > kMediumShared) targets.push_back("portable_medium");
  if (device.shared_bytes > kSmallShared) targets.push_back("portable_small");
  return targets;
}

Gpu Gpu::Of(const Device& device, const char* target) {
  const std::string name = target ? target : device.hopper() ? "sm90a" : "portable";
  Gpu gpu{name != "sm90a", device.shared_bytes, device.shared_of_processor, device.l2_bytes};
  const auto limit = [&](int bytes) { // 1 KiB more for the multiprocessor: as the GPUs of that size have
    gpu.shared_bytes = std::min(gpu.shared_bytes, bytes);
    gpu.shared_of_processor = std::min(gpu.shared_of_processor, bytes + 1024);
  };
  if (name == "portable_medium") limit(kMediumShared);
  if (name == "portable_small") limit(kSmallShared);
  return gpu;
}

void CheckCuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw Error(FP_DEVICE_ERROR, std::string(what) + ": CUDA says: " + cudaGetErrorString(error));
}

OnDevice::OnDevice(int index) {
  CheckCuda(cudaGetDevice(&before_), "current device");
  if (before_ != index) {
    CheckCuda(cudaSetDevice(index), "device_index");
    changed_ = true;
  }
}

OnDevice::~OnDevice() {
  if (changed_) cudaSetDevice(before_);
}

} // namespace flashprefill::cuda
