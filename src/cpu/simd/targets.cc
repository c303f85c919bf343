// Which instruction sets this machine has: CPUID through the compiler's own builtins, asked once.
#include "cpu/simd/targets.h"

#ifdef FLASHPREFILL_AMX_BF16
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace flashprefill::cpu {
namespace {

#ifdef FLASHPREFILL_AMX_BF16
// AMX's registers are large, so Linux gives them to processes that ask for them (from 5.16 on): once, for all threads.
bool HasAmx() {
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22; // CPUID 7.0, EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTile) || !(d & kBf16)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

std::vector<Isa> Detect() {
  std::vector<Isa> isas;
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  // The features that Highway's AVX2 and AVX3 code is compiled for; F16C has no name here and comes with every AVX2.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("aes");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef FLASHPREFILL_AVX512_BF16
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#else
  const bool bf16 = false; // the compiler did not know it
#endif
  // Zen 4 and 5 make a vdpbf16ps (64 operations) as fast as a multiply-add (32); Intel's cores need four times as long
  // for it (measured on Emerald Rapids: 86 against 173 GFLOP/s), so there bf16 is better computed in fp32.
  const bool bf16_is_fast = bf16 && __builtin_cpu_is("amd");
#ifdef FLASHPREFILL_AMX_BF16
  if (bf16 && HasAmx()) isas.push_back(Isa::kAmxBf16); // its softmax rounds by AVX512_BF16
#endif
  if (bf16_is_fast) isas.push_back(Isa::kAvx512Bf16);
  if (avx512) isas.push_back(Isa::kAvx512);
  if (bf16 && !bf16_is_fast) isas.push_back(Isa::kAvx512Bf16);
  if (avx2) isas.push_back(Isa::kAvx2);
#elif defined(__aarch64__)
  isas.push_back(Isa::kNeon);
#endif
  isas.push_back(Isa::kScalar);
  return isas;
}

} // namespace

const std::vector<Isa>& IsasHere() {
  static const std::vector<Isa> isas = Detect();
  return isas;
}

const char* IsaName(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kNeon:
      return "neon";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmxBf16:
      return "amx_bf16";
  }
  return "";
}

Isa IsaOf(const Exec& exec) {
  if (exec.target) {
    for (Isa isa : IsasHere()) {
      if (std::string(exec.target) == IsaName(isa)) return isa;
    }
  }
  return IsasHere().front();
}

} // namespace flashprefill::cpu
