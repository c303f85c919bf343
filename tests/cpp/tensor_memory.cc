// Lays tensors out: see tensor_memory.h.
#include "tensor_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "core/types.h"

namespace flashprefill::test {
namespace {

constexpr int64_t kFarStep = (int64_t{1} << 30) + 24;        // pages: the third lies beyond 2^31 elements
constexpr int64_t kVeryFarStep = (int64_t{1} << 31) + 24;    // sequences and heads: the second does
constexpr int64_t kUnreadStride = (int64_t{1} << 40) + 1234; // for strides that must not be read

} // namespace

Memory::Memory(size_t bytes, bool sparse) : bytes_(std::max<size_t>(bytes, 1)), sparse_(sparse) {
  if (sparse) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) {
      data_ = nullptr;
      throw std::bad_alloc();
    }
  } else {
    data_ = std::malloc(bytes_); // no rounding up: a sanitizer sees the first byte too many
    if (!data_) throw std::bad_alloc();
    std::memset(data_, 0xff, bytes_); // all ones is a NaN in each dtype
  }
}

Memory::~Memory() {
  if (!data_) return;
  if (sparse_) {
    munmap(data_, bytes_);
  } else {
    std::free(data_);
  }
}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(sparse_, other.sparse_);
  return *this;
}

TensorMemory::TensorMemory(int32_t dtype, const int64_t (&extent)[4], Strides strides) {
  const bool packed = extent[0] == 0;
  const int64_t n[4] = {packed ? 1 : extent[0], extent[1], extent[2], extent[3]};
  int64_t* stride = tensor.stride;
  int64_t base = 0;
  // From the innermost axis outwards: each steps over what lies inside it, and a gap.
  const auto nest = [&](const int(&inside_out)[4], int64_t step, const int64_t(&gap)[4]) {
    for (int i = 0; i < 4; ++i) {
      const int axis = inside_out[i];
      stride[axis] = step;
      step = step * std::max<int64_t>(n[axis], 1) + gap[i];
    }
  };
  switch (strides) {
    case Strides::kContiguous:
      nest({3, 2, 1, 0}, 1, {0, 0, 0, 0});
      break;
    case Strides::kHeadMajor:
      nest({3, 1, 2, 0}, 1, {0, 0, 0, 0});
      break;
    case Strides::kPadded:
      nest({3, 2, 1, 0}, 1, {5, 7, 11, 0});
      base = 3;
      break;
    case Strides::kSpreadDim:
      nest({3, 2, 1, 0}, 3, {0, 0, 0, 0});
      break;
    case Strides::kDimMajor:
      nest({1, 3, 2, 0}, 1, {0, 0, 0, 0});
      break;
    case Strides::kReversed:
      nest({3, 2, 1, 0}, 1, {0, 0, 0, 0});
      break;
    case Strides::kFar:
      nest({3, 1, 2, 0}, 1, {0, 0, 0, 0});
      if (packed) {
        stride[2] = kVeryFarStep;
      } else {
        stride[0] = n[0] > 3 ? kFarStep : kVeryFarStep;
      }
      break;
  }
  int64_t elements = base + 1;
  for (int axis = 0; axis < 4; ++axis) elements += std::max<int64_t>(n[axis] - 1, 0) * stride[axis];
  if (strides == Strides::kReversed) {
    for (const int axis : {1, 2}) {
      base += std::max<int64_t>(n[axis] - 1, 0) * stride[axis];
      stride[axis] = -stride[axis];
    }
  }
  if (n[0] * n[1] * n[2] * n[3] == 0) elements = base = 0;
  memory = Memory(static_cast<size_t>(elements) * DtypeSize(dtype), strides == Strides::kFar);
  tensor.data = static_cast<char*>(memory.data()) + base * static_cast<int64_t>(DtypeSize(dtype));
  tensor.dtype = dtype;
  if (packed) stride[0] = kUnreadStride;
}

} // namespace flashprefill::test
