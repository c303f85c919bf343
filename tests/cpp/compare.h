// Whether two results agree: outputs to the dtype's rounding, masks bit for bit except near ties (Rule 4), and results
// of the same backend bit for bit.
#ifndef FLASHPREFILL_TESTS_COMPARE_H_
#define FLASHPREFILL_TESTS_COMPARE_H_

#include <gtest/gtest.h>

#include <map>
#include <tuple>

#include "engine.h"
#include "reference/reference.h"

namespace flashprefill::test {

// Absolute below 1, relative above: of the coarsest dtype among q, k and v.
double Tolerance(const fp_problem& problem);

testing::AssertionResult Close(const fp_problem& problem, const Attended& expected, const Attended& actual);
testing::AssertionResult SameBits(const fp_problem& problem, const Attended& expected, const Attended& actual);

// For each visible block, whether it is open if it is kept when energies are only known to within a relative error of
// `tolerance`, and sums of them to within that share of their total.
std::vector<uint8_t> Undecided(const reference::TileChoice& choice, double tolerance);

// Bits looked at, and those among them that lie near a tie.
struct TieCount {
  int64_t bits = 0, near_ties = 0;
  double share() const { return bits ? static_cast<double>(near_ties) / static_cast<double>(bits) : 0; }
  void Print() const; // and record as a property of the test
};

// What the reference selects, and how it came to it; computed once, compared with many.
class ExpectedMask {
 public:
  ExpectedMask(const fp_problem& problem, const AnyPolicy& policy);
  const Mask& mask() const { return mask_; }
  // Every word of every used row, lists of keys, counts and fallbacks.
  testing::AssertionResult Agrees(const Mask& actual, TieCount& ties) const;

 private:
  const fp_problem& problem_;
  AnyPolicy policy_;
  Mask mask_;
  testing::AssertionResult ListsAgree(const Mask& actual, TieCount& ties) const;

  std::map<std::tuple<int, int64_t, int64_t>, reference::TileChoice> choices_; // by sequence, mask head, tile
  std::map<std::tuple<int, int64_t, int64_t>, reference::KeyChoice> keys_;     // by sequence, mask head, segment
};

// Bit for bit in all rows that belong to a tile.
testing::AssertionResult SameMask(const fp_problem& problem, const Mask& expected, const Mask& actual);

} // namespace flashprefill::test

#endif // FLASHPREFILL_TESTS_COMPARE_H_
