// The lists of cases that select, attend and prefill are compared on: the edge cases that every backend must pass.
#ifndef FLASHPREFILL_TESTS_CASES_H_
#define FLASHPREFILL_TESTS_CASES_H_

#include <vector>

#include "op_case.h"

namespace flashprefill::test {

std::vector<OpCase> LengthCases(); // one row, prefixes off the block grid, 0, 1, block +-1, primes, 2^n +-1, empty ones
std::vector<OpCase> HeadCases();   // GQA groups and head_dims
std::vector<OpCase> DtypeCases();  // all alike, and each mixture that somebody hands over
std::vector<OpCase> LayoutCases(); // rectangular, packed, paged; page sizes; seqused_k
std::vector<OpCase> StrideCases(); // each kind of stride on each tensor
std::vector<OpCase> FarCases();    // offsets beyond 2^31 elements, in address space that is not backed by memory
std::vector<OpCase> LongCases();   // 4K tokens
std::vector<OpCase> PeakedCases(); // structured values

// Policies that decide by score, per head and shared, at this block size.
std::vector<AnyPolicy> ScoringPolicies(int block_size);

// Policies that choose for a whole head at once.
std::vector<AnyPolicy> HeadPolicies(int block_size);

} // namespace flashprefill::test

#endif // FLASHPREFILL_TESTS_CASES_H_
