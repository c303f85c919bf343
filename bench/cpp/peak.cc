// The loops behind PeakFlops: as many independent accumulators as hide the latency, and nothing else. Written as
// assembly, because a compiler would see that nothing comes of it.
#include "peak.h"

#include <algorithm>
#include <cstdint>
#include <ctime>

namespace flashprefill::bench {
namespace {

constexpr int kRounds = 20000;
constexpr int kWindows = 20;

#if defined(__x86_64__)
#define FP_REPEAT_24(x)                                                                                               \
  x(0) x(1) x(2) x(3) x(4) x(5) x(6) x(7) x(8) x(9) x(10) x(11) x(12) x(13) x(14) x(15) x(16) x(17) x(18) x(19) x(20) \
      x(21) x(22) x(23)
#define FP_REPEAT_12(x) x(0) x(1) x(2) x(3) x(4) x(5) x(6) x(7) x(8) x(9) x(10) x(11)
#define FP_ZMM_FMA(n) "vfmadd231ps %%zmm31, %%zmm30, %%zmm" #n "\n"
#define FP_ZMM_DOT(n) "vdpbf16ps %%zmm31, %%zmm30, %%zmm" #n "\n"
#define FP_YMM_FMA(n) "vfmadd231ps %%ymm15, %%ymm14, %%ymm" #n "\n"
#define FP_TILE_DOT(n) "tdpbf16ps %%tmm7, %%tmm6, %%tmm" #n "\n"
#define FP_CLOBBERS                                                                                                   \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
      "xmm14", "xmm15"

double RoundFlops(cpu::Isa isa) { // of one round below
  switch (isa) {
    case cpu::Isa::kAmxBf16:
      return 6 * 16 * 16 * 32 * 2;
    case cpu::Isa::kAvx512Bf16:
      return 24 * 16 * 4;
    case cpu::Isa::kAvx512:
      return 24 * 16 * 2;
    case cpu::Isa::kAvx2:
      return 12 * 8 * 2;
    default:
      return 0;
  }
}

void Round(cpu::Isa isa) {
  switch (isa) {
    case cpu::Isa::kAmxBf16:
      asm volatile(FP_TILE_DOT(0) FP_TILE_DOT(1) FP_TILE_DOT(2) FP_TILE_DOT(3) FP_TILE_DOT(4) FP_TILE_DOT(5)::
                       : "memory");
      break;
    case cpu::Isa::kAvx512Bf16:
      asm volatile(FP_REPEAT_24(FP_ZMM_DOT)::: FP_CLOBBERS);
      break;
    case cpu::Isa::kAvx512:
      asm volatile(FP_REPEAT_24(FP_ZMM_FMA)::: FP_CLOBBERS);
      break;
    case cpu::Isa::kAvx2:
      asm volatile(FP_REPEAT_12(FP_YMM_FMA)::: FP_CLOBBERS);
      break;
    default:
      break;
  }
}

// Eight tiles of 16 rows of 64 bytes for the thread, as long as it lives.
class Tiles {
 public:
  explicit Tiles(cpu::Isa isa) : amx_(isa == cpu::Isa::kAmxBf16) {
    alignas(64) static constexpr uint8_t kConfig[64] = {
        1,  0, 0,  0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 64, 0, 64, 0,  64, 0,  64, 0,  64, 0,
        64, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  0, 0,  0, 16, 16, 16, 16, 16, 16, 16, 16};
    if (amx_) asm volatile("ldtilecfg %0" ::"m"(kConfig));
  }
  ~Tiles() {
    if (amx_) asm volatile("tilerelease" ::: "memory");
  }

 private:
  bool amx_;
};
#else
double RoundFlops(cpu::Isa) { return 0; }
void Round(cpu::Isa) {}
struct Tiles {
  explicit Tiles(cpu::Isa) {}
};
#endif

} // namespace

double ThreadSeconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

double PeakFlops(cpu::Isa isa) {
  if (RoundFlops(isa) == 0) return 0;
  const Tiles tiles(isa);
  double best = 1e9;
  for (int window = 0; window < kWindows; ++window) {
    const double start = ThreadSeconds();
    for (int i = 0; i < kRounds; ++i) Round(isa);
    best = std::min(best, ThreadSeconds() - start);
  }
  return kRounds * RoundFlops(isa) / best;
}

} // namespace flashprefill::bench
