// The GPUs of this machine, asked for once, and which kernels run on each. The runtime is linked statically and the
// driver is found when the first question is asked, so a build with CUDA loads and answers on a machine without a GPU.
#ifndef FLASHPREFILL_CUDA_DEVICES_H_
#define FLASHPREFILL_CUDA_DEVICES_H_

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "core/types.h"

namespace flashprefill::cuda {

constexpr int kMediumShared = 163 * 1024; // of a CTA on an A100 and GPUs of its size,
constexpr int kSmallShared = 99 * 1024;   // and on consumer and workstation GPUs

struct Device {
  std::string name;
  int major = 0, minor = 0;
  int shared_bytes = 0;        // that a CTA may have
  int shared_of_processor = 0; // that its CTAs have together
  int processors = 0;          // multiprocessors
  int l2_bytes = 0;

  bool hopper() const { return major == 9 && minor == 0; }
  bool supported() const { return major >= 8 && shared_bytes >= kSmallShared; }
  std::string arch() const { return "sm_" + std::to_string(major) + std::to_string(minor); }
};

struct Devices {
  std::vector<Device> all;
  std::string why_none; // if all is empty
};

const Devices& AllDevices();

// What a call runs on: whose kernels, and the limits that their plans must keep.
struct Gpu {
  bool portable;           // those of sm80/, for every GPU since Ampere; else Hopper's, of sm90/
  int shared_bytes;        // that a CTA may have
  int shared_of_processor; // that the CTAs of a multiprocessor have together; each takes 1 KiB more than it asks for
  int l2_bytes;

  static Gpu Of(const Device& device, const char* target);

  // Whether COUNT CTAs of that many bytes fit on a multiprocessor.
  bool Holds(int count, int bytes) const {
    return bytes <= shared_bytes && count * (bytes + 1024) <= shared_of_processor;
  }
};

// The names of a device's targets, best first: "sm90a" on Hopper, and everywhere "portable" and that with the shared
// memory of smaller GPUs, so that what they run can be tested on a larger one.
std::vector<std::string> TargetsOf(const Device& device);

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
