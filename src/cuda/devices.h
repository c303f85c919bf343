// The GPUs of this machine, asked for once. The runtime is linked statically and the driver is found when the first
// question is asked, so a build with CUDA loads and answers on a machine without a GPU.
#ifndef FLASHPREFILL_CUDA_DEVICES_H_
#define FLASHPREFILL_CUDA_DEVICES_H_

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

namespace flashprefill::cuda {

struct Device {
  std::string name;
  int major, minor;
  bool supported() const { return major == 9 && minor == 0; }
  std::string arch() const { return "sm_" + std::to_string(major) + std::to_string(minor); }
};

struct Devices {
  std::vector<Device> all;
  std::string why_none; // if all is empty
};

const Devices& AllDevices();

// Makes a device the calling thread's current one for as long as this object lives.
class OnDevice {
 public:
  explicit OnDevice(int index);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Throws Error(FP_DEVICE_ERROR) with the runtime's words if this is an error.
void CheckCuda(cudaError_t error, const char* what);

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_DEVICES_H_
