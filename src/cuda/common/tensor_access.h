// Whether tensors lie in memory as the kernels read them. Plain C++.
#ifndef FLASHPREFILL_CUDA_COMMON_TENSOR_ACCESS_H_
#define FLASHPREFILL_CUDA_COMMON_TENSOR_ACCESS_H_

#include "core/types.h"

namespace flashprefill::cuda {

// Rows of 16-bit values can be read 16 bytes at a time.
inline bool ReadsBy16Bytes(const Tensor& t) {
  bool can = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride[3] == 1;
  for (int axis = 0; axis < 3; ++axis) can &= t.stride[axis] % 8 == 0;
  return can;
}

// The same without negative strides, which the copy engine does not know.
inline bool IsAligned(const Tensor& t) {
  return ReadsBy16Bytes(t) && t.stride[0] >= 0 && t.stride[1] >= 0 && t.stride[2] >= 0;
}

// The refusal of a tensor that is not.
constexpr const char* kUnalignedQ =
    "q must be 16-byte aligned on CUDA, with head_dim stride 1 and the other strides multiples of 8 and not negative";
constexpr const char* kUnalignedK =
    "k must be 16-byte aligned on CUDA, with head_dim stride 1 and the other strides multiples of 8 and not negative";
constexpr const char* kUnalignedV =
    "v must be 16-byte aligned on CUDA, with head_dim stride 1 and the other strides multiples of 8 and not negative";
constexpr const char* kUnalignedOut =
    "out must be 16-byte aligned on CUDA, with head_dim stride 1 and the other strides multiples of 8 and not negative";

// Counts of tokens that fit the kernels' ints.
inline bool FewTokens(const Problem& p) {
  constexpr int64_t kMost = (int64_t{1} << 30) - 1;
  return p.total_q <= kMost && p.total_k <= kMost && p.max_seqlen_k <= kMost;
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_TENSOR_ACCESS_H_
