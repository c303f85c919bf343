// Masks that need no scores: Dense, Streaming, and any policy where the host can tell that the forced blocks are all
// there is. Plain C++.
#ifndef FLASHPREFILL_CUDA_COMMON_ENERGIES_MASK_H_
#define FLASHPREFILL_CUDA_COMMON_ENERGIES_MASK_H_

#include <cuda_runtime_api.h>

#include "cuda/common/sequence.cuh"

namespace flashprefill::cuda {

struct MaskArgs {
  DeviceProblem d;
  TileRules rules;
  uint64_t* bits;
  int32_t* counts;   // or null
  int32_t* fallback; // or null
  int mask_heads;
  int64_t words;
  int* attend_counter; // set to zero for an attend that follows, or null
};

cudaError_t LaunchMask(const MaskArgs& args, cudaStream_t stream);

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ENERGIES_MASK_H_
