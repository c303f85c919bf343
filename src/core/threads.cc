// Threads from whichever OpenMP runtime the process already has. A process often holds two: torch's wheel brings its
// own libgomp under another name, a C++ program has the system's, LLVM users have libomp. Two pools of threads that
// both spin after their parallel regions fight for the cores: the next region of one runtime waits for the other's
// spinning threads. So this library is linked with none. It looks for the runtime that the process has already loaded,
// prefers torch's, and enters it through GOMP_parallel, the entry that GCC's compiled regions call and that libgomp,
// libomp and libiomp5 all export. Without any it starts threads of its own, at some 20 us per thread and call.
#include "core/threads.h"

#include <dlfcn.h>
#include <link.h>

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

bool Bind(void* handle, const char* path, Runtime& runtime) {
  if (!handle) return false;
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

// The best runtime among the loaded libraries; failing that, one that the loader can find.
Runtime Find() {
  Candidate best;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& candidate = *static_cast<Candidate*>(data);
        const int preference = Preference(info->dlpi_name);
        if (preference > candidate.preference) candidate = {preference, info->dlpi_name};
        return 0;
      },
      &best);
  Runtime runtime;
  if (best.preference && Bind(dlopen(best.path.c_str(), RTLD_NOW | RTLD_NOLOAD), best.path.c_str(), runtime)) {
    return runtime;
  }
  for (const char* name : {"libgomp.so.1", "libomp.so.5", "libomp.so"}) {
    if (Bind(dlopen(name, RTLD_NOW | RTLD_LOCAL), name, runtime)) break;
  }
  return runtime;
}

// Looked up again only after the process has loaded further libraries: torch may come after us.
const Runtime& Current() {
  static std::mutex mutex;
  static unsigned long long seen = ~0ull;
  static std::atomic<const Runtime*> current{nullptr};
  unsigned long long loaded = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        *static_cast<unsigned long long*>(data) = info->dlpi_adds;
        return 1; // the count of loads is the same in every entry
      },
      &loaded);
  const std::lock_guard lock(mutex);
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
  if (runtime.parallel) {
    runtime.parallel([](void* r) { static_cast<Region*>(r)->Enter(); }, &region, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back([&] { region.Enter(); });
  region.Enter();
  for (std::thread& other : others) other.join();
}

std::string ThreadRuntime() { return Current().name; }

} // namespace flashprefill
