// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): random words that are a
// function of a counter and a key, so that any of them can be drawn by any thread.
#ifndef FLASHPREFILL_CORE_PHILOX_H_
#define FLASHPREFILL_CORE_PHILOX_H_

#include <array>
#include <cstdint>

namespace flashprefill {

inline std::array<uint32_t, 4> Philox(std::array<uint32_t, 4> x, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = uint64_t{0xD2511F53u} * x[0], b = uint64_t{0xCD9E8D57u} * x[2];
    x = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ k0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ x[3] ^ k1, static_cast<uint32_t>(a)};
  }
  return x;
}

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_PHILOX_H_
