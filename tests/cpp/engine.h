// The three verbs over any backend and instruction set, called through the C ABI as a user would, with what the caller
// has to provide: masks, workspaces of exactly the bytes asked for (full of NaN), outputs. Calls must succeed; a status
// other than FP_OK fails the test with the library's message.
#ifndef FLASHPREFILL_TESTS_ENGINE_H_
#define FLASHPREFILL_TESTS_ENGINE_H_

#include <string>
#include <vector>

#include "op_case.h"
#include "policy.h"

namespace flashprefill::test {

// A CPU backend and one of its targets (empty: it has no choice).
struct Engine {
  std::string backend;
  std::string target;
  std::string Name() const { return target.empty() ? backend : backend + "/" + target; }
};

Engine Reference();
std::vector<Engine> OtherEngines(); // every available CPU backend but the reference, with every target
std::vector<Engine> AllEngines();   // the reference too

// A mask and its memory. Fresh masks are full of ones and nonsense, so that words that are never written show.
struct Mask {
  fp_block_mask view{};
  std::vector<uint64_t> bits;
  std::vector<int32_t> counts, fallback, vertical_slash, key_lists, skipped;

  Mask() = default;
  Mask(const fp_problem& problem, const fp_policy* policy);
  Mask(const Mask& other) { *this = other; }
  Mask& operator=(const Mask& other);
  void PointAtOwn(); // view's arrays are this object's

  uint64_t* Row(int64_t row) { return bits.data() + row * view.words; }
  const uint64_t* Row(int64_t row) const { return bits.data() + row * view.words; }
  std::vector<int32_t> Keys(const Sequence& s, int64_t head, int64_t segment) const; // of a list
};

// A mask with each visible block kept with this probability, and random bits where attend must not look.
Mask RandomMask(const fp_problem& problem, int block_size, bool share_heads, int32_t mean_correction, double density,
                uint64_t seed);

// The mask with a list of keys for each segment of so many tiles: each of its keys with this probability, in the future
// too, and as many as there is room for. Unused room is full of nonsense.
Mask WithKeyLists(const fp_problem& problem, Mask mask, int segment_tiles, int max_keys, double density, uint64_t seed);

// Outputs in logical order: (sequence, token, head, dim) and (sequence, token, head).
struct Attended {
  std::vector<float> out, lse; // lse is empty if it was not asked for
};

struct Prefilled {
  Mask mask;
  Attended attended;
};

Mask Select(const Engine& engine, const fp_problem& problem, const AnyPolicy& policy, int threads = 2);
Attended Attend(const Engine& engine, const fp_problem& problem, const Mask& mask, int threads = 2,
                Strides out = Strides::kContiguous, bool want_lse = true);
Prefilled Prefill(const Engine& engine, const fp_problem& problem, const AnyPolicy& policy, int threads = 2,
                  Strides out = Strides::kContiguous);
Attended PrefillWithoutMask(const Engine& engine, const fp_problem& problem, const AnyPolicy& policy);
// With a mask that has room for counts and fallback only.
Prefilled PrefillWithCounts(const Engine& engine, const fp_problem& problem, const AnyPolicy& policy);

// What a guard wrote, and its settings with pointers to it.
struct GuardResults {
  fp_guard settings;
  std::vector<float> recall, low, p05, certificate, levels; // levels are empty if there are none
  std::vector<int32_t> rows, missed_block, outcome;

  GuardResults(const fp_problem& problem, const fp_guard& settings, std::vector<float> levels = {});
  fp_guard View(); // lives as long as this
};

// Any settings with these changed.
fp_guard GuardOf(int32_t mode, int32_t rows, float target = 0.9f, uint64_t seed = 0);

// The mask may be repaired.
GuardResults Audit(const Engine& engine, const fp_problem& problem, Mask& mask, const fp_guard& settings,
                   int threads = 2);

struct Guarded {
  Prefilled prefilled;
  GuardResults guard;
};
Guarded PrefillGuarded(const Engine& engine, const fp_problem& problem, const AnyPolicy& policy,
                       const fp_guard& settings, std::vector<float> levels = {}, int threads = 2);

// Index in Attended::lse of (token i of sequence s, head h); times head_dim: in Attended::out.
int64_t LogicalRow(const fp_problem& problem, const Sequence& s, int64_t i, int64_t h);

} // namespace flashprefill::test

#endif // FLASHPREFILL_TESTS_ENGINE_H_
