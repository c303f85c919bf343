// What a guard found in nodes, summed up: docs/guard.md. Heads count once per layer and sequence of a micro-batch.
#ifndef FLASHPREFILL_INTEGRATIONS_GGML_FOUND_H_
#define FLASHPREFILL_INTEGRATIONS_GGML_FOUND_H_

#include <cstdint>
#include <string>
#include <vector>

#include "flashprefill/flashprefill.h"

namespace flashprefill::ggml {

struct Found {
  static constexpr int kOutcomes = 5; // of fp_guard_outcome

  double moments[3] = {};        // number, sum and sum of squares of audited rows' recalls
  int64_t heads[kOutcomes] = {}; // by what became of them

  bool any() const { return all() > 0; }
  int64_t all() const;
  void Add(const Found& other);
  double recall() const { return moments[0] > 0 ? moments[1] / moments[0] : 1.0; } // mean of these rows
  // A lower bound of the mean recall, right with probability 0.999.
  double at_least() const;
  // "recall 0.957, at least 0.951; 3 of 960 heads repaired"
  std::string Line() const;
  std::string Json() const;
};

// Room for what a guard finds in one call with one sequence.
class FindingRoom {
 public:
  // Points the guard to it.
  void Offer(int32_t heads, fp_guard& guard);
  Found Sum() const;

 private:
  std::vector<int32_t> outcome_;
  double moments_[3];
};

} // namespace flashprefill::ggml

#endif // FLASHPREFILL_INTEGRATIONS_GGML_FOUND_H_
