// flashprefill_bench: the kernels by themselves, on one thread, with Google Benchmark's usual options:
//     make build
//     build/release/bench/flashprefill_bench --benchmark_filter=attend --benchmark_repetitions=5
// `peak` in a row is the share of the multiply-add units' best rate, measured in the same process.
#include <benchmark/benchmark.h>

#include "benches.h"

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  flashprefill::bench::RegisterAttend();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
