// What depends on a GPU's speed and caches, and not on its instructions: from how many keys on a selection pays, and
// how many KV heads are worked on at a time. Each number says where it was measured, or what it was derived from. Plain
// C++.
#ifndef FLASHPREFILL_CUDA_COMMON_HEURISTICS_H_
#define FLASHPREFILL_CUDA_COMMON_HEURISTICS_H_

#include <algorithm>

#include "cuda/devices.h"

namespace flashprefill::cuda {

// In a prefill sequences of at most this many keys are attended to densely under a policy of energies.
//
// Hopper, measured on an H200 with 32 heads of 128: select and attend take 0.030 ms more than attend over the same
// density, and at 3072 keys dense attention takes 0.121 ms and the density of real text, about 0.8, saves no more than
// that.
//
// Portable kernels: 2560, derived from what was measured on an H200 at 4096 keys: dense attention takes 0.431 ms, the
// operator at a density of 0.74 0.351 ms, 0.032 more than that share of dense. At 2560 keys dense takes 0.168 ms, and a
// density of 0.85 saves 0.025; at 3072 keys 0.242, and 0.8 saves 0.048. Elsewhere both sides grow: dense attention is
// 1.9 times as long on an A100 (195 TFLOP/s) and 2.4 times on an RTX 4090 (152), and selection, half of it launches and
// half memory (4.2, 2.0 and 1.0 TB/s), 1.5 and 2.5 times.
inline int EnergiesDenseUpToKeys(const Gpu& gpu) { return gpu.portable ? 2560 : 3072; }

// Bytes of K and V that stay in L2 while a section of KV heads is worked on. An H200 has 60 MB, of which each half of
// the chip may hold its own copy: 20 MB were measured to be best there (at 64K, one head at a time is 16 % faster than
// all 8). A third of the cache on other GPUs is 13 MB of an A100's 40, 24 of an RTX 4090's 72, 32 of an RTX 5090's 96.
inline int64_t SectionBytes(const Gpu& gpu) { return gpu.portable ? gpu.l2_bytes / 3 : int64_t{20} << 20; }

// Warps of a CTA that chooses blocks, at most `most`, each with so many floats of shared memory. Eight CTAs per
// multiprocessor: waits for memory then hide behind each other.
inline int KeepWarps(const Gpu& gpu, int floats, int most) {
  int warps = std::clamp(gpu.shared_bytes / 4 / floats, 1, most);
  while (warps > 1 && 8 * warps * floats * 4 > gpu.shared_bytes) warps /= 2;
  return warps;
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_HEURISTICS_H_
