// Rows of q and k in the kernels of select: they are brought to fp32, added up, and their means are rounded.
//
// Per-target code: include it after hwy/highway.h in a file of kernels (see targets.h).
#if defined(FLASHPREFILL_CPU_SIMD_INPUT_ROWS_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHPREFILL_CPU_SIMD_INPUT_ROWS_H_
#undef FLASHPREFILL_CPU_SIMD_INPUT_ROWS_H_
#else
#define FLASHPREFILL_CPU_SIMD_INPUT_ROWS_H_
#endif

#include <algorithm>
#include <type_traits>

#include "core/half.h"
#include "core/types.h"
#include "cpu/simd/rows.h"
#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flashprefill::cpu::HWY_NAMESPACE {

constexpr DF f;

template <int32_t DTYPE>
using Element = std::conditional_t<DTYPE == FP_F32, float, std::conditional_t<DTYPE == FP_E4M3, uint8_t, uint16_t>>;

// Calls body with the dtype as a constant.
template <typename Body>
HWY_INLINE void WithDtype(int32_t dtype, const Body& body) {
  if (dtype == FP_F32) return body(std::integral_constant<int32_t, FP_F32>());
  if (dtype == FP_BF16) return body(std::integral_constant<int32_t, FP_BF16>());
  if (dtype == FP_E4M3) return body(std::integral_constant<int32_t, FP_E4M3>());
  body(std::integral_constant<int32_t, FP_F16>());
}

// into[i] = from[i * step], or += with ADD.
template <int32_t DTYPE, bool ADD>
HWY_INLINE void TakeRow(const Element<DTYPE>* HWY_RESTRICT from, int64_t step, int64_t n, float* HWY_RESTRICT into) {
  int64_t i = 0;
  if (step == 1) {
    for (; i + kLanes <= n; i += kLanes) {
      const VF x = LoadVector(from, DTYPE, i);
      hn::StoreU(ADD ? hn::Add(hn::LoadU(f, into + i), x) : x, f, into + i);
    }
  }
  for (; i < n; ++i) into[i] = (ADD ? into[i] : 0.f) + LoadElement(from, DTYPE, i * step);
}

// Asks for a row of n neighbouring elements ahead of its use. Rows of one head lie pages apart, where the hardware
// does not look ahead by itself.
template <typename T>
HWY_INLINE void PrefetchRow(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) hwy::Prefetch(row + i);
}
constexpr int64_t kAhead = 4; // tokens

// A mean's one rounding to its input's dtype (MeanDtype).
HWY_INLINE VF Rounded(int32_t dtype, VF x) {
  dtype = MeanDtype(dtype);
  if (dtype == FP_F32) return x;
  HWY_ALIGN uint16_t half[kLanes];
  StoreVector(x, half, dtype, 0);
  return LoadVector(half, dtype, 0);
}

// row[i] = map(row[i]) for i < n. map is a function of vectors; the rest of the row goes through one too.
template <typename Map>
HWY_INLINE void MapRow(float* row, int64_t n, const Map& map) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(map(hn::LoadU(f, row + i)), f, row + i);
  if (i >= n) return;
  HWY_ALIGN float rest[kLanes] = {};
  std::copy(row + i, row + n, rest);
  hn::Store(map(hn::Load(f, rest)), f, rest);
  std::copy(rest, rest + (n - i), row + i);
}

// Calls body(first key, keys, element offset) for the runs of keys that lie stride[1] apart.
template <typename Body>
HWY_INLINE void ForRuns(const Problem& p, const Sequence& s, int64_t begin, int64_t end, int head, const Body& body) {
  while (begin < end) {
    const int64_t in_page = p.block_table ? p.page_size - begin % p.page_size : end - begin;
    const int64_t n = std::min(in_page, end - begin);
    body(begin, n, KeyOffset(p, p.k.stride, s, begin, head));
    begin += n;
  }
}

// Brings one head's keys of a block to fp32 rows, scales included; where K is transposed the loop over tokens is the
// inner one.
template <int32_t DTYPE>
void LoadKeys(const Problem& p, const Sequence& s, int64_t begin, int64_t end, int head, float* rows) {
  const int64_t d = p.head_dim;
  ForRuns(p, s, begin, end, head, [&](int64_t first, int64_t n, int64_t offset) {
    const Element<DTYPE>* from = static_cast<const Element<DTYPE>*>(p.k.data) + offset;
    float* into = rows + (first - begin) * d;
    if (p.k.stride[1] == 1 && p.k.stride[3] != 1) {
      for (int64_t i = 0; i < d; ++i) {
        for (int64_t t = 0; t < n; ++t) into[t * d + i] = LoadElement(from, DTYPE, i * p.k.stride[3] + t);
      }
      return;
    }
    for (int64_t t = 0; t < n; ++t, from += p.k.stride[1]) {
      PrefetchRow(from + kAhead * p.k.stride[1], d);
      TakeRow<DTYPE, false>(from, p.k.stride[3], d, into + t * d);
    }
  });
  ScaleRow(KeyScale(p, s, head), (end - begin) * d, rows);
}

} // namespace flashprefill::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif // per-target include guard
