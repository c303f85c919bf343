// What the machine's multiply-add units can do, measured in the same run as what is compared with it: clock rates and
// neighbours on shared machines change from minute to minute.
#ifndef FLASHPREFILL_BENCH_PEAK_H_
#define FLASHPREFILL_BENCH_PEAK_H_

#include "cpu/simd/targets.h"

namespace flashprefill::bench {

// Operations a second (a multiply-add is two) of one thread on independent registers: fp32 multiply-adds, vdpbf16ps for
// Isa::kAvx512Bf16, tdpbf16ps for Isa::kAmxBf16. The best of a few short windows of CPU time. 0 where there is no loop
// for it.
double PeakFlops(cpu::Isa isa);

// CPU time of this thread, in seconds.
double ThreadSeconds();

} // namespace flashprefill::bench

#endif // FLASHPREFILL_BENCH_PEAK_H_
