// Shared by the fuzz targets: reading an input, memory with guarded ends, and how many inputs were accepted.
#ifndef FLASHPREFILL_TESTS_FUZZ_H_
#define FLASHPREFILL_TESTS_FUZZ_H_

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "flashprefill/flashprefill.h"

namespace flashprefill::test {

inline int64_t accepted = 0; // inputs that were not refused, for the short run among the tests

// Stops the program with a reason, so that the fuzzer keeps the input.
[[noreturn]] inline void Finding(const std::string& what) {
  std::fprintf(stderr, "finding: %s; the last error is '%s'\n", what.c_str(), fp_last_error());
  std::abort();
}

// Reads the input from its front; zeros once it is used up.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  template <typename T>
  T Raw() {
    T value{};
    const size_t n = std::min(sizeof(T), size_);
    if (n > 0) std::memcpy(&value, data_, n);
    data_ += n;
    size_ -= n;
    return value;
  }
  int Upto(int most) { return Raw<uint8_t>() % (most + 1); }
  bool OneIn(int n) { return Upto(n - 1) == n - 1; }

  // Usually the sane value, now and then anything at all.
  template <typename T>
  T Mostly(T sane) {
    return OneIn(64) ? Raw<T>() : sane;
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

// A heap block of exactly this many bytes, so that the sanitizer guards both ends.
struct Buffer {
  // Other numbers of 8, 16 or 32 bits than the first ones: between 2e-3 and 4 in size if `sane`, else anything, NaN and
  // infinities too.
  void Scatter(uint32_t seed, bool sane) {
    constexpr uint8_t kHigh[] = {0x3c, 0xbc, 0x3b, 0x40, 0xc0, 0x3a, 0xb9, 0x38}; // sign, exponent
    for (size_t i = 0; i < size; ++i) {
      seed = seed * 1664525 + 1013904223;
      const auto any = static_cast<uint8_t>(seed >> 24);
      data[i] = !sane ? any : i % 2 == 1 ? kHigh[any % 8] : any & 0x3f; // no NaN of 8 bits either
    }
  }

  explicit Buffer(size_t bytes)
      : size(bytes), data(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))) {
    std::memset(data, 0x3c, (bytes + 63) / 64 * 64); // fp16 1.06, bf16 0.0115, fp32 0.0115
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  size_t size;
  uint8_t* data;
};

} // namespace flashprefill::test

#endif // FLASHPREFILL_TESTS_FUZZ_H_
