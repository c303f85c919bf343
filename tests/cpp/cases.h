// The lists of cases that select, attend and prefill are compared on: the edge cases that every backend must pass.
#ifndef FLASHPREFILL_TESTS_CASES_H_
#define FLASHPREFILL_TESTS_CASES_H_

#include <cstddef>
#include <vector>

#include "op_case.h"

namespace flashprefill::test {

// --small was given: run a part of the cases.
bool Small();
void SetSmall(bool small);

// All of the cases, or with --small each `step`-th of them.
template <typename T>
std::vector<T> Thinned(const std::vector<T>& all, size_t step = 4) {
  if (!Small()) return all;
  std::vector<T> some;
  for (size_t i = 0; i < all.size(); i += step) some.push_back(all[i]);
  return some;
}

std::vector<OpCase> LengthCases(); // one row, prefixes off the block grid, 0, 1, block +-1, primes, 2^n +-1, empty ones
std::vector<OpCase> HeadCases();   // GQA groups and head_dims
std::vector<OpCase> DtypeCases();  // the same for all, and each mixture that engines hand over
std::vector<OpCase> LayoutCases(); // rectangular, packed, paged; page sizes; seqused_k
std::vector<OpCase> StrideCases(); // each kind of stride on each tensor
std::vector<OpCase> FarCases();    // offsets beyond 2^31 elements, in address space that is not backed by memory
std::vector<OpCase> LongCases();   // 4K tokens
std::vector<OpCase> PeakedCases(); // structured values
std::vector<OpCase> MixedCases();  // a few of all kinds: what the bit-for-bit properties run on

} // namespace flashprefill::test

#endif // FLASHPREFILL_TESTS_CASES_H_
