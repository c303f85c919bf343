// Threads for CPU backends. They come from the OpenMP runtime that the process already has: see threads.cc.
#ifndef FLASHPREFILL_CORE_THREADS_H_
#define FLASHPREFILL_CORE_THREADS_H_

#include <string>
#include <type_traits>

namespace flashprefill {

// Threads that a call with this wish (0: no wish) may use at most. Workspaces are sized by it.
int ThreadCount(int wish);

// Runs body(context, thread) on up to `threads` threads at once, thread = 0 .. n-1, and returns when all are done.
// Fewer may run than asked for (inside another parallel region, say), so bodies take their work from a shared counter.
// Bodies must not throw.
void ParallelRaw(int threads, void (*body)(void* context, int thread), void* context);

template <typename Body>
void Parallel(int threads, Body&& body) {
  ParallelRaw(
      threads, [](void* context, int thread) { (*static_cast<std::remove_reference_t<Body>*>(context))(thread); },
      &body);
}

// Name of the runtime in use, for people.
std::string ThreadRuntime();

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_THREADS_H_
