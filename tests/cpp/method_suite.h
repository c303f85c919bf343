// The comparison that every method passes: masks of each backend and instruction set against the reference, over all
// lists of cases (select_test.cc). A method's own test registers the policies that are compared:
//
//     const RegisterSuite suite({.method = "sketch", .policies = Policies, .scale = 2});
//
// A method that registers none is compared by its defaults.
#ifndef FLASHPREFILL_TESTS_METHOD_SUITE_H_
#define FLASHPREFILL_TESTS_METHOD_SUITE_H_

#include <functional>
#include <string>
#include <vector>

#include "compare.h"
#include "engine.h"

namespace flashprefill::test {

struct MethodSuite {
  std::string method; // its name in text
  // Policies at a block size, for problems of so many query heads.
  std::function<std::vector<AnyPolicy>(int block_size, int q_heads)> policies;
  float scale = 0; // softmax_scale of cases that don't say one; above head_dim^-1/2 it makes scores peaked
  size_t many = 0; // policies per case of lengths and dtypes; 0: all
  size_t few = 0;  // policies per case of the other lists; 0: half of them
};

struct RegisterSuite {
  explicit RegisterSuite(const MethodSuite& suite);
};

// One for each method of the build.
std::vector<MethodSuite> MethodSuites();

// Policies of all methods, some of them corrected, and with shared heads too where a method has that: what properties
// of attention as a whole are tried with.
std::vector<AnyPolicy> MixedPolicies(int q_heads);

// Masks of all engines against the reference's.
void CompareSelect(const OpData& data, const AnyPolicy& policy, TieCount& ties);

} // namespace flashprefill::test

#endif // FLASHPREFILL_TESTS_METHOD_SUITE_H_
