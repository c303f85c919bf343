// The short run of a fuzz target among the tests, with any compiler: main() feeds it a fixed number of pseudo-random
// inputs, which it mutates by the target's own mutator where there is one.
#include <random>
#include <vector>

#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed)
    __attribute__((weak));

namespace {

constexpr size_t kMaxSize = 512;
std::mt19937 random_bits(7);

} // namespace

// libFuzzer's own mutation; here one byte is changed.
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t) {
  if (size > 0) data[random_bits() % size] = static_cast<uint8_t>(random_bits());
  return size;
}

int main(int argc, char** argv) {
  const int runs = argc > 1 ? std::atoi(argv[1]) : 2000;
  std::vector<uint8_t> input(kMaxSize);
  size_t size = 0;
  for (int i = 0; i < runs; ++i) {
    if (LLVMFuzzerCustomMutator) {
      size = LLVMFuzzerCustomMutator(input.data(), size, kMaxSize, static_cast<unsigned>(random_bits()));
    } else {
      size = kMaxSize;
      for (uint8_t& byte : input) byte = static_cast<uint8_t>(random_bits());
    }
    const std::vector<uint8_t> exact(input.begin(), input.begin() + static_cast<std::ptrdiff_t>(size));
    LLVMFuzzerTestOneInput(exact.data(), exact.size());
  }
  const int64_t accepted = flashprefill::test::accepted;
  std::printf("%d inputs, %lld accepted, no finding\n", runs, static_cast<long long>(accepted));
  return accepted > runs / 20 && accepted < runs ? 0 : 1; // else it would test only one side
}
