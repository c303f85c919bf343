// What depends on a GPU's speed and caches, and not on its instructions: from how many keys on a selection pays, and
// how many KV heads are worked on at a time. Each number says where it was measured, or what it was derived from. Plain
// C++.
#ifndef FLASHPREFILL_CUDA_COMMON_HEURISTICS_H_
#define FLASHPREFILL_CUDA_COMMON_HEURISTICS_H_

#include "cuda/devices.h"

namespace flashprefill::cuda {

// In a prefill sequences of at most this many keys are attended to densely under a policy of energies.
//
// Hopper, measured on an H200 with 32 heads of 128: select and attend take 0.030 ms more than attend over the same
// density, and at 3072 keys dense attention takes 0.121 ms and the density of real text, about 0.8, saves no more than
// that.
//
// Portable kernels: 2048. Dense attention takes twice as long there on an H200, three and a half times on an A100
// (195 TFLOP/s for 690), and four and a half on an RTX 4090 (152); selection is launches, the same everywhere, and
// memory (4.2, 2.0 and 1.0 TB/s). With a share of 0.2 saved, it pays from 0.2 x 0.75 = 0.15 ms of dense attention on,
// if half of the 0.030 ms are launches and the other half doubles. That is 2,300 keys on an H200 and fewer on the
// others.
inline int EnergiesDenseUpToKeys(const Gpu& gpu) { return gpu.portable ? 2048 : 3072; }

// Bytes of K and V that stay in L2 while a section of KV heads is worked on. An H200 has 60 MB, of which each half of
// the chip may hold its own copy: 20 MB were measured to be best there (at 64K, one head at a time is 16 % faster than
// all 8). A third of the cache on other GPUs is 13 MB of an A100's 40, 24 of an RTX 4090's 72, 32 of an RTX 5090's 96.
inline int64_t SectionBytes(const Gpu& gpu) { return gpu.portable ? gpu.l2_bytes / 3 : int64_t{20} << 20; }

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_HEURISTICS_H_
