// A list of units of work, taken from a shared counter by whichever thread is free.
#ifndef FLASHPREFILL_CPU_WORK_H_
#define FLASHPREFILL_CPU_WORK_H_

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "core/threads.h"

namespace flashprefill::cpu {

// Runs work(index, thread) for all indices below n.
template <typename Work>
void ForAll(int threads, int64_t n, const Work& work) {
  std::atomic<int64_t> next{0};
  Parallel(static_cast<int>(std::min<int64_t>(threads, n)), [&](int thread) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) work(i, thread);
  });
}

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_WORK_H_
