// Finds the backend for a call: the one that is named, or the best that is available.
#include "core/backend.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"

namespace flashprefill {
namespace {

const Backend* FindBackend(const char* name) {
  for (const Backend* backend : Backends()) {
    if (name && std::strcmp(backend->name, name) == 0) return backend;
  }
  return nullptr;
}

std::string BackendNames() {
  std::vector<std::string> names;
  for (const Backend* backend : Backends()) names.emplace_back(backend->name);
  return Joined(names, ", ");
}

} // namespace

// The backend that exec names, or the best available one for the problem's memory.
const Backend& BackendFor(const Problem& p, const Exec& exec) {
  const Backend* chosen = nullptr;
  if (exec.backend) {
    chosen = FindBackend(exec.backend);
    if (!chosen) Refuse("exec.backend", exec.backend, "one of " + BackendNames());
    if (chosen->device != p.device) {
      Refuse("exec.backend", exec.backend,
             std::string("a backend for ") + (p.device == FP_CUDA ? "CUDA" : "CPU") + " memory");
    }
    if (!chosen->available())
      Refuse("exec.backend", exec.backend, "one that can run here: " + chosen->describe(), FP_UNSUPPORTED);
  } else {
    for (const Backend* backend : Backends()) {
      if (backend->device == p.device && backend->available() && (!chosen || backend->rank > chosen->rank))
        chosen = backend;
    }
    if (!chosen) {
      std::string why;
      for (const Backend* backend : Backends()) {
        if (backend->device == p.device) why += std::string("; ") + backend->name + ": " + backend->describe();
      }
      throw Error(FP_UNSUPPORTED, std::string("device is ") + (p.device == FP_CUDA ? "FP_CUDA" : "FP_CPU") +
                                      "; no backend here can work on that memory (built: " + BackendNames() + ")" +
                                      why);
    }
  }
  if (exec.target) {
    const std::vector<std::string> targets = chosen->targets();
    if (std::find(targets.begin(), targets.end(), exec.target) == targets.end()) {
      Refuse("exec.target", exec.target,
             "one that backend " + std::string(chosen->name) + " has here: " + Joined(targets, " "));
    }
  }
  return *chosen;
}

const Backend& NamedBackend(const char* name) {
  const Backend* backend = FindBackend(name);
  if (!backend) Refuse("backend", name ? name : "NULL", "one of " + BackendNames());
  return *backend;
}

} // namespace flashprefill
