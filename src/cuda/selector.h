// How the CUDA backend selects by one method. src/methods/<name>/cuda.cc defines `extern const cuda::Selector kCuda`
// over the plan of a family of kernels (common/*/plan.h), CMake writes the table of them. Plain C++.
#ifndef FLASHPREFILL_CUDA_SELECTOR_H_
#define FLASHPREFILL_CUDA_SELECTOR_H_

#include <cuda_runtime_api.h>

#include "core/backend.h"
#include "core/types.h"
#include "cuda/devices.h"

namespace flashprefill::cuda {

// An attend that follows select on the stream. It may start before select's last launch is done.
struct Follow {
  int* attend_counter = nullptr; // of tiles handed out: select sets it to zero. Null: no attend follows
  int dense_up_to_keys = 0;      // sequences of at most this many keys keep everything, as FP_FALLBACK_SHORT
};

// Where select writes, and on which stream.
struct SelectTarget {
  const BlockMask& mask;
  cudaStream_t stream;
  Follow follow = {};
};

// Means of a problem's blocks (common/means.h), in scratch memory.
struct Means {
  void* k = nullptr;
  void* v = nullptr;
};

struct Selector {
  // Null if the kernels do this problem and policy, else the requirement that is not met, in words.
  const char* (*unsupported)(const Problem&, const Policy&, const Gpu&);
  // Takes scratch memory and, unless `target` is null (a size query), puts select on the stream. With `correction` also
  // the pooling of K and V for attend, in the same pass where the method has one; these means are returned.
  Means (*select)(const Problem&, const Policy&, const Gpu&, bool correction, Workspace&, const SelectTarget* target);
  // In a prefill sequences of at most this many keys are attended to densely, since they gain less than select takes.
  // Null: none are.
  int (*dense_up_to_keys)(const Gpu&) = nullptr;
  // Whether blocks are kept for their scores. If not, tiles keep equally many but for those of a dense tail.
  bool scores = true;
  // Whether it selects too where every query sees every key. If not, such a problem is refused.
  bool without_causal = false;
};

// Null for a method without CUDA kernels.
const Selector* SelectorOf(const Policy& policy);

// One call of select over a plan, which has
//     const char* Unsupported() const
//     void Take(Workspace&, bool correction)               its scratch memory, `means` among it
//     cudaError_t Launch(const SelectTarget&) const
template <class Plan>
Means SelectBy(Plan plan, bool correction, Workspace& workspace, const SelectTarget* target) {
  plan.Take(workspace, correction);
  if (target) CheckCuda(plan.Launch(*target), "select");
  return plan.means;
}

// A selector over the plan that PLAN_OF(problem, policy, gpu) makes.
template <auto PLAN_OF>
constexpr Selector SelectorOver() {
  return {[](const Problem& p, const Policy& policy, const Gpu& gpu) { return PLAN_OF(p, policy, gpu).Unsupported(); },
          [](const Problem& p, const Policy& policy, const Gpu& gpu, bool correction, Workspace& workspace,
             const SelectTarget* target) { return SelectBy(PLAN_OF(p, policy, gpu), correction, workspace, target); }};
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SELECTOR_H_
