// Powers of two of a vector. Per-target code: include it after hwy/highway.h in a file of kernels (see targets.h).
#if defined(FLASHPREFILL_CPU_SIMD_EXP2_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHPREFILL_CPU_SIMD_EXP2_H_
#undef FLASHPREFILL_CPU_SIMD_EXP2_H_
#else
#define FLASHPREFILL_CPU_SIMD_EXP2_H_
#endif

#include "cpu/simd/rows.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flashprefill::cpu::HWY_NAMESPACE {

// 2^x for x <= 0, with a relative error below 4e-6; 0 below 2^-126 and for -inf. Adding 1.5 * 2^23 rounds x to an
// integer and leaves that integer in the lowest bits, from where it is shifted into the exponent.
HWY_INLINE VF Exp2(VF x) {
  constexpr DF f;
  const VF magic = hn::Set(f, 12582912.f);
  const VF shifted = hn::Add(x, magic);
  const VF r = hn::Sub(x, hn::Sub(shifted, magic));
  VF y = hn::Set(f, 0.00957010221f);
  y = hn::MulAdd(y, r, hn::Set(f, 0.0559178591f));
  y = hn::MulAdd(y, r, hn::Set(f, 0.240247443f));
  y = hn::MulAdd(y, r, hn::Set(f, 0.693121791f));
  y = hn::MulAdd(y, r, hn::Set(f, 0.999999285f));
  const DI i;
  const auto power = hn::ShiftLeft<23>(hn::BitCast(i, shifted));
  const VF scaled = hn::BitCast(f, hn::Add(hn::BitCast(i, y), power));
  return hn::IfThenElseZero(hn::Ge(x, hn::Set(f, -126.f)), scaled);
}

} // namespace flashprefill::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif // per-target include guard
