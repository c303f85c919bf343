// Memory of tensors in every arrangement of strides, all NaN at first: whatever a test does not fill and a kernel reads
// into a product shows.
#ifndef FLASHPREFILL_TESTS_TENSOR_MEMORY_H_
#define FLASHPREFILL_TESTS_TENSOR_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <utility>

#include "flashprefill/flashprefill.h"

namespace flashprefill::test {

enum class Strides {
  kContiguous, // [sequence or page, token, head, dim]
  kHeadMajor,  // [sequence or page, head, token, dim], as Transformers has it
  kPadded,     // gaps between rows, heads and sequences, and a start that is not aligned
  kSpreadDim,  // head_dim stride 3
  kDimMajor,   // [sequence or page, head, dim, token]: K transposed inside a page
  kReversed,   // tokens and heads run backwards
  kFar         // sequences, pages or heads lie 2^30 elements or more apart, in memory that is mostly not there
};

// Zeroed or NaN-filled memory of a tensor; far tensors are mapped without being reserved.
class Memory {
 public:
  Memory() = default;
  Memory(size_t bytes, bool sparse);
  ~Memory();
  Memory(Memory&& other) noexcept { *this = std::move(other); }
  Memory& operator=(Memory&& other) noexcept;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool sparse() const { return sparse_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  bool sparse_ = false;
};

// A tensor and the memory under it, all NaN (sparse memory: zero).
struct TensorMemory {
  Memory memory;
  fp_tensor tensor{};

  TensorMemory() = default;
  // extent: sequences or pages, tokens, heads, dims. A first extent of 0 stands for "packed": its stride is not read.
  TensorMemory(int32_t dtype, const int64_t (&extent)[4], Strides strides);
};

} // namespace flashprefill::test

#endif // FLASHPREFILL_TESTS_TENSOR_MEMORY_H_
