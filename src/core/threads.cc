// Threads from the OpenMP runtime that the process already has. A process often holds several: torch's wheel brings its
// own libgomp under another name, a C++ program has the system's, LLVM users have libomp, and vLLM's guide preloads
// libiomp5. Two pools of threads that both spin after their parallel regions fight for the cores, and a runtime that is
// loaded but unused may have bound this thread to one core. So this library is linked with none. It takes the runtime
// that the process's own code would enter, the one that the symbol GOMP_parallel resolves to; libgomp, libomp and
// libiomp5 all export it. If none is visible to all, it takes a loaded one, torch's first. Without any it starts
// threads of its own, at some 20 us per thread and call. A forked child does so too: libgomp's threads are not there
// after a fork, and its next parallel region would wait for them for ever.
#include "core/threads.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

namespace flashprefill {
namespace {

struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*max_threads)() = nullptr;
  std::string name = "none: threads of our own";
};

// The preference for the runtime in this file; 0 if it is none.
int Preference(const char* path) {
  const char* slash = std::strrchr(path, '/');
  const char* file = slash ? slash + 1 : path;
  const auto starts = [&](const char* prefix) { return std::strncmp(file, prefix, std::strlen(prefix)) == 0; };
  if (!starts("libgomp") && !starts("libomp") && !starts("libiomp5")) return 0;
  if (std::strstr(path, "/torch/")) return 3;
  return starts("libgomp") ? 1 : 2;
}

// Takes the runtime behind this handle (which may be RTLD_DEFAULT) if it has what is needed.
bool Bind(void* handle, const char* path, Runtime& runtime) {
  const auto parallel = reinterpret_cast<decltype(runtime.parallel)>(dlsym(handle, "GOMP_parallel"));
  const auto max_threads = reinterpret_cast<decltype(runtime.max_threads)>(dlsym(handle, "omp_get_max_threads"));
  if (!parallel || !max_threads) return false;
  runtime.parallel = parallel;
  runtime.max_threads = max_threads;
  const char* slash = std::strrchr(path, '/');
  runtime.name = slash ? slash + 1 : path;
  if (std::strstr(path, "/torch/")) runtime.name += " (torch)";
  return true;
}

struct Candidate {
  int preference = 0;
  std::string path;
};

// The runtime that the process's own regions enter; else the best among the loaded libraries; else one that the loader
// can find.
Runtime Find() {
  Runtime runtime;
  Dl_info visible;
  void* entry = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  if (entry && dladdr(entry, &visible) && Bind(RTLD_DEFAULT, visible.dli_fname, runtime)) return runtime;
  Candidate best;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& candidate = *static_cast<Candidate*>(data);
        const int preference = Preference(info->dlpi_name);
        if (preference > candidate.preference) candidate = {preference, info->dlpi_name};
        return 0;
      },
      &best);
  const auto open = [&](const char* path, int flags) {
    void* handle = dlopen(path, flags);
    return handle && Bind(handle, path, runtime);
  };
  if (best.preference && open(best.path.c_str(), RTLD_NOW | RTLD_NOLOAD)) return runtime;
  for (const char* name : {"libgomp.so.1", "libomp.so.5", "libomp.so"}) {
    if (open(name, RTLD_NOW | RTLD_LOCAL)) break;
  }
  return runtime;
}

std::mutex current_mutex;
std::atomic<bool> forked{false};

// A fork holds the mutex, so that the child does not inherit it locked by a thread that it does not have.
void WatchForks() {
  static const int watching = pthread_atfork([] { current_mutex.lock(); }, [] { current_mutex.unlock(); },
                                             [] {
                                               forked = true;
                                               current_mutex.unlock();
                                             });
  static_cast<void>(watching);
}

// Looked up again only after the process has loaded further libraries: torch may come after us.
const Runtime& Current() {
  WatchForks();
  static unsigned long long seen = ~0ull;
  static std::atomic<const Runtime*> current{nullptr};
  unsigned long long loaded = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        *static_cast<unsigned long long*>(data) = info->dlpi_adds;
        return 1; // the count of loads is the same in every entry
      },
      &loaded);
  const std::lock_guard lock(current_mutex);
  if (!current || seen != loaded) {
    const Runtime found = Find();
    // Callers hold references without the lock, so a runtime that has been handed out is never changed or freed; there
    // is a handful of them in a process's life.
    if (!current || found.parallel != current.load()->parallel) current = new Runtime(found);
    seen = loaded;
  }
  return *current;
}

} // namespace

int ThreadCount(int wish) {
  if (wish > 0) return wish;
  const Runtime& runtime = Current();
  if (runtime.max_threads) return std::max(1, runtime.max_threads());
  return std::max(1u, std::thread::hardware_concurrency());
}

void ParallelRaw(int threads, void (*body)(void*, int), void* context) {
  if (threads <= 1) {
    body(context, 0);
    return;
  }
  struct Region {
    void (*body)(void*, int);
    void* context;
    std::atomic<int> next{0};
    void Enter() { body(context, next.fetch_add(1, std::memory_order_relaxed)); }
  } region{body, context};
  const Runtime& runtime = Current();
  if (runtime.parallel && !forked) {
    runtime.parallel([](void* r) { static_cast<Region*>(r)->Enter(); }, &region, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back([&] { region.Enter(); });
  region.Enter();
  for (std::thread& other : others) other.join();
}

std::string ThreadRuntime() { return forked ? "none after a fork: threads of our own" : Current().name; }

} // namespace flashprefill
