// The instruction sets that the CPU kernels are compiled for, and the choice among them.
//
// A file of kernels is compiled once for each of Highway's targets below (hwy/foreach_target.h includes it again and
// again, in namespaces of their own) and ends with a table of function pointers. Which table serves a call is decided
// here from CPUID, or by exec.target. Nothing of Highway's own dispatch is used, so nothing of it is linked.
//
// How a file of kernels begins and ends:
//
//     #include "cpu/simd/targets.h"
//     #undef HWY_TARGET_INCLUDE
//     #define HWY_TARGET_INCLUDE "cpu/my_kernels.cc"
//     #include "hwy/foreach_target.h"
//     #include "hwy/highway.h"
//     #include "cpu/simd/rows.h"
//     HWY_BEFORE_NAMESPACE();
//     namespace flashprefill::cpu::HWY_NAMESPACE {
//     ...
//     constexpr MyKernels kMyKernels = {...};
//     } // namespace
//     HWY_AFTER_NAMESPACE();
//     #if HWY_ONCE
//     FLASHPREFILL_EXPORT_KERNELS(MyKernels)
//     #endif
#ifndef FLASHPREFILL_CPU_SIMD_TARGETS_H_
#define FLASHPREFILL_CPU_SIMD_TARGETS_H_

#include <string>
#include <vector>

#include "core/types.h"

// All that the compiler can make, the baseline included: a wheel has to run everywhere. SSE is left out because no
// machine that reads long prompts stops there, AVX3_DL because its new instructions are of no use here, SVE because the
// kernels want vectors whose length is known when they are compiled.
#define HWY_COMPILE_ALL_ATTAINABLE
#define HWY_DISABLED_TARGETS                                                                                         \
  (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_SSE2 | HWY_AVX3_ZEN4 | \
   HWY_AVX3_SPR | HWY_NEON_WITHOUT_AES | HWY_NEON_BF16)
#include "hwy/detect_targets.h"
#ifndef HWY_SSE2 // targets that newer versions of Highway know
#define HWY_SSE2 0
#endif
#ifndef HWY_AVX3_ZEN4
#define HWY_AVX3_ZEN4 0
#endif
#ifndef HWY_AVX3_SPR
#define HWY_AVX3_SPR 0
#endif
#ifndef HWY_NEON_WITHOUT_AES
#define HWY_NEON_WITHOUT_AES 0
#endif
#ifndef HWY_NEON_BF16
#define HWY_NEON_BF16 0
#endif

// The table of this name for an Isa. kAvx512Bf16 and kAmxBf16 have files of their own; elsewhere they mean kAvx512.
#define FLASHPREFILL_KERNELS_FOR(isa, table)                                 \
  ((isa) == ::flashprefill::cpu::Isa::kAvx2     ? HWY_CHOOSE_AVX2(table)     \
   : (isa) == ::flashprefill::cpu::Isa::kNeon   ? HWY_CHOOSE_NEON(table)     \
   : (isa) == ::flashprefill::cpu::Isa::kScalar ? HWY_CHOOSE_FALLBACK(table) \
                                                : HWY_CHOOSE_AVX3(table))

// Defines `const TYPE& TYPEFor(const Exec& exec)`, which returns the table kTYPE of the call's instruction set.
#define FLASHPREFILL_EXPORT_KERNELS(TYPE)                                         \
  const flashprefill::cpu::TYPE& flashprefill::cpu::TYPE##For(const Exec& exec) { \
    return *FLASHPREFILL_KERNELS_FOR(IsaOf(exec), k##TYPE);                       \
  }

namespace flashprefill::cpu {

enum class Isa { kScalar, kNeon, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };

// The instruction sets that this machine has and this build has kernels for, best first.
const std::vector<Isa>& IsasHere();

// "scalar", "neon", "avx2", "avx512", "avx512_bf16" or "amx_bf16", as exec.target has it.
const char* IsaName(Isa isa);

// The one that a call uses: exec.target, or the best.
Isa IsaOf(const Exec& exec);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_SIMD_TARGETS_H_
