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
      devices.all.push_back({"an unreadable GPU", 0, 0});
    } else {
      devices.all.push_back({properties.name, properties.major, properties.minor});
    }
  }
  return devices;
}

} // namespace

const Devices& AllDevices() {
  static const Devices devices = Find();
  return devices;
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
