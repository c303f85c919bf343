// Arguments and sizes of the 8-bit attend kernel.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_PARAMS_H_
#define FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_PARAMS_H_

#include "cuda/common/attend/images.h"
#include "cuda/sm90/attend/params.h"

namespace flashprefill::cuda {

// Shared memory: Q as it comes 32 KiB, in 8 bits 16, K and V 4 stages of 16 each, O 32: 208. More stages don't fit.
struct Attend8Shape {
  static constexpr int kHeadDim = kImageColumns;
  static constexpr int kPanels = kHeadDim / kPanelColumns; // of Q in 16 bits
  static constexpr int kKeys = kImageKeys;
  static constexpr int kStages = 4;
  static constexpr int kOutColumns = kHeadDim;
  static constexpr int kProducerRegisters = 56;
  static constexpr int kMathRegisters = 224;
  static_assert(128 * kProducerRegisters + 256 * kMathRegisters == 64512, "all registers are used");
};

struct Attend8Params : AttendParams { // but for the maps of K, V and means
  Images images;
  Divider by_mean_image;     // keys that an image of means stands for
  int keys_each, means_each; // images of a sequence, unless K is packed
  int zero_image;            // of keys that don't exist
  float softmax_scale;       // for the LSE
};

using Attend8Kernel = void (*)(Attend8Params);
struct Attend8KernelSet {
  Attend8Kernel kernel;
  int shared_bytes;
};
template <class T>
Attend8KernelSet Attend8KernelOf();

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_PARAMS_H_
