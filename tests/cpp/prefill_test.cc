// Select and attend in one call: masks and outputs of each CPU backend of this build, on every instruction set that the
// machine has, against the reference, over the policies of all methods.
#include <gtest/gtest.h>

#include <iterator>

#include "cases.h"
#include "method_suite.h"

namespace flashprefill::test {
namespace {

TEST(Prefill, MaskAndOutput) {
  if (OtherEngines().empty()) GTEST_SKIP() << "the reference is the only CPU backend of this build";
  constexpr int kSizes[] = {64, 16, 128, 48, 32, 1024};
  TieCount ties;
  std::vector<OpCase> cases;
  for (const auto& list : {LengthCases(), DtypeCases(), PeakedCases(), LayoutCases()}) {
    cases.insert(cases.end(), list.begin(), list.end());
  }
  cases = Thinned(cases, 6);
  for (size_t i = 0; i < cases.size(); ++i) {
    const OpData data(cases[i]);
    const fp_problem& p = data.problem();
    std::vector<AnyPolicy> policies;
    for (const MethodSuite& suite : MethodSuites()) {
      for (const AnyPolicy& policy : suite.policies(kSizes[i % std::size(kSizes)], p.q_heads)) {
        policies.push_back(policy);
      }
    }
    AnyPolicy policy = policies[i * 23 % policies.size()]; // another one each time
    if (i % 3 != 0) policy = Corrected(policy);
    SCOPED_TRACE(data.op().Describe() + "; " + Name(policy));
    const ExpectedMask expected(p, policy);
    for (const Engine& engine : OtherEngines()) {
      const Prefilled actual = Prefill(engine, p, policy, 2, data.op().out_strides);
      EXPECT_TRUE(expected.Agrees(actual.mask, ties)) << engine.Name();
      EXPECT_TRUE(Close(p, Attend(Reference(), p, actual.mask), actual.attended)) << engine.Name();
    }
  }
  ties.Print();
}

} // namespace
} // namespace flashprefill::test
