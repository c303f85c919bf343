// Attend with bf16 products, for AVX512_BF16: vdpbf16ps multiplies pairs, c += a0 b0 + a1 b1, in 16 lanes, which on
// AMD's cores (Zen 4 and later) is twice the work of an fp32 multiply-add in the same time. It serves calls whose q, k
// and v are all bf16; Q and K enter the products exactly as they are, P is rounded to bf16.
//
// The schedule is that of kernels.cc, the layouts are its layouts with pairs in the place of elements: pairs of
// d in Q and K, pairs of keys in P and V. Highway 1.0.3 has no such operation, so these are intrinsics, in a file that
// is compiled with -mavx512bf16 and called behind CPUID. It includes no C++ header on purpose: an inline function
// emitted here could be the one that the linker keeps for machines that cannot run it.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu/attend/kernels.h"

namespace flashprefill::cpu {

extern const AttendKernels kAttendBf16Kernels;

namespace {

constexpr int kLanes = 16;
constexpr int kRows = 8; // 8 x 32: 16 of 32 registers
constexpr int kVectors = 2;
constexpr int kPanel = kVectors * kLanes;
constexpr int kStrip = 48;
static_assert(kStrip <= kMaxStrip && kGroup % kPanel == 0, "see kernels.h");

// ---------------------------------------------------------------- the micro-kernel

using Pair = uint32_t; // two bf16

// `ahead` is fetched meanwhile, a line for every kAheadStep rows of B, as in kernels.cc.
constexpr int kAheadStep = 8;
constexpr int kLine = 16; // pairs

template <int ROWS, int VECTORS, bool ADD>
void Micro(const Pair* __restrict__ a, int64_t a_stride, const Pair* __restrict__ b, int64_t b_stride, int64_t depth,
           float* __restrict__ c, int64_t c_stride, const Pair* ahead) {
  __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) sum[r][j] = _mm512_setzero_ps();
  }
  auto step = [&](int64_t k) {
    __m512bh row[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) row[j] = (__m512bh)_mm512_loadu_si512(b + k * b_stride + j * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * a_stride + k]));
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], x, row[j]);
    }
  };
  int64_t k = 0;
  for (; k + kAheadStep <= depth; ahead += kLine) {
    __builtin_prefetch(ahead, 0, 2); // into L2
    for (const int64_t end = k + kAheadStep; k < end; ++k) step(k);
  }
  for (; k < depth; ++k) step(k);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
      float* to = c + r * c_stride + j * kLanes;
      _mm512_storeu_ps(to, ADD ? _mm512_add_ps(sum[r][j], _mm512_loadu_ps(to)) : sum[r][j]);
    }
  }
}

// of[rows - 1][vectors - 1]
template <bool ADD>
struct MicroTable {
  decltype(&Micro<1, 1, false>) of[kRows][kVectors] = {
      {Micro<1, 1, ADD>, Micro<1, 2, ADD>}, {Micro<2, 1, ADD>, Micro<2, 2, ADD>}, {Micro<3, 1, ADD>, Micro<3, 2, ADD>},
      {Micro<4, 1, ADD>, Micro<4, 2, ADD>}, {Micro<5, 1, ADD>, Micro<5, 2, ADD>}, {Micro<6, 1, ADD>, Micro<6, 2, ADD>},
      {Micro<7, 1, ADD>, Micro<7, 2, ADD>}, {Micro<8, 1, ADD>, Micro<8, 2, ADD>}};
};
constexpr MicroTable<false> kMultiply;
constexpr MicroTable<true> kMultiplyAdd;

// ---------------------------------------------------------------- everything else

#include "cpu/attend/bf16.inc"

} // namespace

const AttendKernels kAttendBf16Kernels = {sizeof(uint16_t), LoadQueries, PackKeys, PackValues, Mean,
                                          AttendChunk,      nullptr,     Finish};

} // namespace flashprefill::cpu
