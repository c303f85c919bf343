// The driver's tensor map encoder, found once through the runtime.
#include "cuda/common/tensor_map.h"

#include <algorithm>

#include "flashprefill/flashprefill.h"

namespace flashprefill::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode FindEncode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
  return status == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

} // namespace

cudaError_t MakeTensorMap(CUtensorMap* map, const void* data, int32_t dtype, const TensorMapShape& shape) {
  static const Encode encode = FindEncode();
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint64_t size[4], stride[3];
  for (int i = 0; i < 4; ++i) size[i] = static_cast<cuuint64_t>(std::max<int64_t>(1, shape.size[i]));
  for (int i = 0; i < 3; ++i) {
    // The stride of an axis with one entry is never used, but must look right.
    stride[i] = shape.size[i + 1] > 1 ? static_cast<cuuint64_t>(shape.stride[i]) * 2 : 16;
  }
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(shape.box_heads), static_cast<cuuint32_t>(shape.box_tokens),
                             1};
  const cuuint32_t step[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type =
      dtype == FP_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(map, type, 4, const_cast<void*>(data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

} // namespace flashprefill::cuda
