// bf16, fp16 and FP8, one value at a time, in plain integer arithmetic: for the reference and for edges. Round to
// nearest even.
#ifndef FLASHPREFILL_CORE_HALF_H_
#define FLASHPREFILL_CORE_HALF_H_

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "flashprefill/flashprefill.h"

namespace flashprefill {

inline float FromBf16(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }

inline uint16_t ToBf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u); // keep NaN a NaN
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float FromF16(uint16_t x) {
  const uint32_t sign = uint32_t{x & 0x8000u} << 16;
  const uint32_t exponent = (x >> 10) & 31u;
  const uint32_t mantissa = x & 0x3ffu;
  if (exponent == 0) { // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

inline uint16_t ToF16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u); // 65520 and up round to infinity
  if (magnitude < 0x38800000u) {                                              // below 2^-14: subnormal steps of 2^-24
    const float steps = std::nearbyintf(std::bit_cast<float>(magnitude) * 0x1p24f);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(steps));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// E4M3: one exponent for NaN alone would be a waste, so only 0x7f and 0xff are NaN, and the largest value is 448.
inline float FromE4M3(uint8_t x) {
  const uint32_t magnitude = x & 0x7fu;
  if (magnitude == 0x7f) return std::bit_cast<float>(0x7fc00000u | uint32_t{x & 0x80u} << 24);
  const float value = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f // zero or subnormal
                                    : std::bit_cast<float>((magnitude << 20) + (120u << 23));
  return x & 0x80 ? -value : value;
}

// Larger values saturate, as they do where caches are written.
inline uint8_t ToE4M3(float x) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return static_cast<uint8_t>(sign | 0x7f);
  if (magnitude >= 448) return static_cast<uint8_t>(sign | 0x7e);
  if (magnitude < 0x1p-6f)
    return static_cast<uint8_t>(sign | static_cast<uint32_t>(std::nearbyintf(magnitude * 0x1p9f)));
  const uint32_t u = std::bit_cast<uint32_t>(magnitude);
  return static_cast<uint8_t>(sign | ((u + 0x7ffffu + ((u >> 20) & 1u) - (120u << 23)) >> 20));
}

// The value at element `offset` of an array of this dtype.
inline float LoadElement(const void* data, int32_t dtype, int64_t offset) {
  if (dtype == FP_F32) return static_cast<const float*>(data)[offset];
  if (dtype == FP_E4M3) return FromE4M3(static_cast<const uint8_t*>(data)[offset]);
  const uint16_t x = static_cast<const uint16_t*>(data)[offset];
  return dtype == FP_BF16 ? FromBf16(x) : FromF16(x);
}

inline void StoreElement(void* data, int32_t dtype, int64_t offset, float value) {
  if (dtype == FP_F32) {
    static_cast<float*>(data)[offset] = value;
  } else if (dtype == FP_E4M3) {
    static_cast<uint8_t*>(data)[offset] = ToE4M3(value);
  } else {
    static_cast<uint16_t*>(data)[offset] = dtype == FP_BF16 ? ToBf16(value) : ToF16(value);
  }
}

// The value after one rounding to this dtype, for FP8 to bf16: what Rule 4 does to means (MeanDtype).
inline float RoundTo(int32_t dtype, float value) {
  if (dtype == FP_F32) return value;
  return dtype == FP_F16 ? FromF16(ToF16(value)) : FromBf16(ToBf16(value));
}

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_HALF_H_
