// Rows of q, k, v and out, whatever their dtype and strides, from and to fp32. A row is head_dim elements `step` apart;
// where step is 1 (all caches but transposed ones) whole vectors are converted.
//
// Per-target code: include it after hwy/highway.h in a file of kernels (see targets.h). Offsets are in elements.
#if defined(FLASHPREFILL_CPU_SIMD_ROWS_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHPREFILL_CPU_SIMD_ROWS_H_
#undef FLASHPREFILL_CPU_SIMD_ROWS_H_
#else
#define FLASHPREFILL_CPU_SIMD_ROWS_H_
#endif

#include <cstdint>

#include "core/half.h"
#include "core/types.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flashprefill::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DI = hn::RebindToSigned<DF>;
using DU = hn::RebindToUnsigned<DF>;
using DU16 = hn::Rebind<uint16_t, DF>;
using VF = hn::Vec<DF>;
constexpr int64_t kLanes = hn::MaxLanes(DF()); // what Lanes() is on all targets of ours

// Highway's fp16 conversions are not exact where it has no instruction for them.
constexpr bool kHasF16Instructions = HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128;

HWY_INLINE VF FromBf16(hn::Vec<DU16> x) { return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(DU(), x))); }

// Rounds to the nearest bf16, ties to even; the result is in the low 16 bits of each lane. NaN stays NaN.
HWY_INLINE hn::Vec<DU> ToBf16Bits(VF x) {
  const DU du;
  const auto u = hn::BitCast(du, x);
  const auto odd = hn::And(hn::ShiftRight<16>(u), hn::Set(du, 1));
  const auto rounded = hn::Add(u, hn::Add(odd, hn::Set(du, 0x7fff)));
  const auto is_nan = hn::RebindMask(du, hn::IsNaN(x));
  return hn::ShiftRight<16>(hn::IfThenElse(is_nan, hn::Or(u, hn::Set(du, 0x400000)), rounded));
}

// Shifted by 7, E4M3's 4 bits of exponent and 3 of mantissa are fp16's of the number divided by 2^8, since the biases
// are 7 and 15: of subnormal numbers too.
HWY_INLINE VF FromE4M3(const uint8_t* from) {
  const DF df;
  if constexpr (kHasF16Instructions) {
    const DU16 du16;
    const hn::Rebind<hwy::float16_t, DF> df16;
    const auto x = hn::PromoteTo(du16, hn::LoadU(hn::Rebind<uint8_t, DF>(), from));
    const auto magnitude = hn::And(x, hn::Set(du16, 0x7f));
    const auto sign = hn::ShiftLeft<8>(hn::And(x, hn::Set(du16, 0x80)));
    const auto nan = hn::IfThenElse(hn::Eq(magnitude, hn::Set(du16, 0x7f)), hn::Set(du16, 0x7e00), hn::Zero(du16));
    const auto bits = hn::Or(hn::Or(hn::ShiftLeft<7>(magnitude), sign), nan);
    return hn::Mul(hn::PromoteTo(df, hn::BitCast(df16, bits)), hn::Set(df, 256.0f));
  } else {
    HWY_ALIGN float lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = flashprefill::FromE4M3(from[i]);
    return hn::Load(df, lanes);
  }
}

// One vector of unit-stride elements.
HWY_INLINE VF LoadVector(const void* data, int32_t dtype, int64_t offset) {
  if (dtype == FP_F32) return hn::LoadU(DF(), static_cast<const float*>(data) + offset);
  if (dtype == FP_E4M3) return FromE4M3(static_cast<const uint8_t*>(data) + offset);
  const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
  if (dtype == FP_BF16) return FromBf16(hn::LoadU(DU16(), from));
  if constexpr (kHasF16Instructions) {
    const hn::Rebind<hwy::float16_t, DF> df16;
    return hn::PromoteTo(DF(), hn::BitCast(df16, hn::LoadU(DU16(), from)));
  } else {
    HWY_ALIGN float lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = flashprefill::FromF16(from[i]);
    return hn::Load(DF(), lanes);
  }
}

// STREAM: past the caches, to an address that is a multiple of the vector's size.
template <bool STREAM = false>
HWY_INLINE void StoreVector(VF x, void* data, int32_t dtype, int64_t offset) {
  const auto store = [](auto vector, auto d, auto* to) HWY_ATTR {
    if constexpr (STREAM) {
      hn::Stream(vector, d, to);
    } else {
      hn::StoreU(vector, d, to);
    }
  };
  if (dtype == FP_F32) return store(x, DF(), static_cast<float*>(data) + offset);
  uint16_t* to = static_cast<uint16_t*>(data) + offset;
  if (dtype == FP_BF16) return store(hn::TruncateTo(DU16(), ToBf16Bits(x)), DU16(), to);
  if constexpr (kHasF16Instructions) {
    const hn::Rebind<hwy::float16_t, DF> df16;
    store(hn::BitCast(DU16(), hn::DemoteTo(df16, x)), DU16(), to);
  } else {
    HWY_ALIGN float lanes[kLanes];
    hn::Store(x, DF(), lanes);
    for (int64_t i = 0; i < kLanes; ++i) to[i] = flashprefill::ToF16(lanes[i]);
  }
}

// row[i] *= scale: what FP8 was stored without.
HWY_INLINE void ScaleRow(float scale, int64_t count, float* row) {
  if (scale == 1) return;
  const VF factor = hn::Set(DF(), scale);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) hn::StoreU(hn::Mul(hn::LoadU(DF(), row + i), factor), DF(), row + i);
  for (; i < count; ++i) row[i] *= scale;
}

// to[0, count) = the row times scale; to[count, padded) = 0.
HWY_INLINE void LoadRow(const void* data, int32_t dtype, int64_t offset, int64_t step, int64_t count, int64_t padded,
                        float* to, float scale = 1) {
  int64_t i = 0;
  if (step == 1) {
    for (; i + kLanes <= count; i += kLanes) hn::StoreU(LoadVector(data, dtype, offset + i), DF(), to + i);
  }
  for (; i < count; ++i) to[i] = LoadElement(data, dtype, offset + i * step);
  for (; i < padded; ++i) to[i] = 0;
  ScaleRow(scale, count, to);
}

// The row = from[0, count) * factor; with `stream` past the caches if it can be.
HWY_INLINE void StoreRow(const float* from, float factor, int64_t count, void* data, int32_t dtype, int64_t offset,
                         int64_t step, bool stream) {
  int64_t i = 0;
  const auto f = hn::Set(DF(), factor);
  const int64_t size = static_cast<int64_t>(DtypeSize(dtype));
  if (step == 1 && stream && (reinterpret_cast<uintptr_t>(data) + offset * size) % (kLanes * size) == 0) {
    for (; i + kLanes <= count; i += kLanes) {
      StoreVector<true>(hn::Mul(hn::LoadU(DF(), from + i), f), data, dtype, offset + i);
    }
  } else if (step == 1) {
    for (; i + kLanes <= count; i += kLanes) {
      StoreVector(hn::Mul(hn::LoadU(DF(), from + i), f), data, dtype, offset + i);
    }
  }
  for (; i < count; ++i) StoreElement(data, dtype, offset + i * step, from[i] * factor);
}

} // namespace flashprefill::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif // per-target include guard
