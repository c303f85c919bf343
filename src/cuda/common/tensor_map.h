// Tensor maps for bulk copies of 16-bit tensors, in boxes of 64 columns with the 128-byte swizzle that wgmma reads. The
// driver's encoder is found at run time, so that the library links without libcuda and loads on machines without a GPU.
#ifndef FLASHPREFILL_CUDA_COMMON_TENSOR_MAP_H_
#define FLASHPREFILL_CUDA_COMMON_TENSOR_MAP_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace flashprefill::cuda {

// Axes from the innermost: column (stride 1), head, token, batch or page. Strides of the last three in elements.
struct TensorMapShape {
  int64_t size[4];
  int64_t stride[3];
  int box_heads, box_tokens; // besides 64 columns and one batch entry
};

cudaError_t MakeTensorMap(CUtensorMap* map, const void* data, int32_t dtype, const TensorMapShape& shape);

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_TENSOR_MAP_H_
