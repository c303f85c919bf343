// The sets of benchmarks in this program; each file registers its own.
#ifndef FLASHPREFILL_BENCH_BENCHES_H_
#define FLASHPREFILL_BENCH_BENCHES_H_

namespace flashprefill::bench {

void RegisterAttend(); // attend_bench.cc

} // namespace flashprefill::bench

#endif // FLASHPREFILL_BENCH_BENCHES_H_
