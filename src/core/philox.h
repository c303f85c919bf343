// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): random words that are a
// function of a counter and a key, so that any of them can be drawn by any thread, of a GPU too.
#ifndef FLASHPREFILL_CORE_PHILOX_H_
#define FLASHPREFILL_CORE_PHILOX_H_

#include <array>
#include <cstdint>

#include "core/host_device.h"

namespace flashprefill {

// Makes the words of x random.
FLASHPREFILL_HOST_DEVICE inline void PhiloxRounds(uint32_t (&x)[4], uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = uint64_t{0xD2511F53u} * x[0], b = uint64_t{0xCD9E8D57u} * x[2];
    x[0] = static_cast<uint32_t>(b >> 32) ^ x[1] ^ k0;
    x[2] = static_cast<uint32_t>(a >> 32) ^ x[3] ^ k1;
    x[1] = static_cast<uint32_t>(b);
    x[3] = static_cast<uint32_t>(a);
  }
}

inline std::array<uint32_t, 4> Philox(std::array<uint32_t, 4> x, uint64_t key) {
  uint32_t words[4] = {x[0], x[1], x[2], x[3]};
  PhiloxRounds(words, key);
  return {words[0], words[1], words[2], words[3]};
}

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_PHILOX_H_
