// The short run of a fuzz target among the tests, with any compiler: main() feeds it the files of its corpus, then a
// fixed number of pseudo-random inputs, which it mutates by the target's own mutator where there is one.
//   fuzz_c_abi_short RUNS FOLDER
#include <filesystem>
#include <fstream>
#include <iterator>
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

namespace {

// Runs the files of a folder, and returns how many there were.
int ReplayCorpus(const char* folder) {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    std::ifstream file(entry.path(), std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    ++files;
  }
  return files;
}

} // namespace

int main(int argc, char** argv) {
  const int runs = argc > 1 ? std::atoi(argv[1]) : 2000;
  const int files = argc > 2 ? ReplayCorpus(argv[2]) : 1;
  flashprefill::test::accepted = 0;
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
  std::printf("%d files; %d inputs, %lld accepted; no finding\n", files, runs, static_cast<long long>(accepted));
  return files > 0 && accepted > runs / 20 && accepted < runs ? 0 : 1; // else it would test only one side
}
