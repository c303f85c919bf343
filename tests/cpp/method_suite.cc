// The register of suites: see method_suite.h.
#include "method_suite.h"

#include <gtest/gtest.h>

#include "cases.h"

namespace flashprefill::test {
namespace {

std::vector<MethodSuite>& Registered() {
  static std::vector<MethodSuite> suites;
  return suites;
}

MethodSuite SuiteOf(const MethodName& method) {
  for (const MethodSuite& suite : Registered()) {
    if (suite.method == method.name) return suite;
  }
  return {.method = method.name, .policies = [name = method.name](int block_size, int) -> std::vector<AnyPolicy> {
            return {Parse(name, block_size)};
          }};
}

} // namespace

RegisterSuite::RegisterSuite(const MethodSuite& suite) { Registered().push_back(suite); }

std::vector<MethodSuite> MethodSuites() {
  std::vector<MethodSuite> suites;
  for (const MethodName& method : AllMethods()) suites.push_back(SuiteOf(method));
  return suites;
}

std::vector<AnyPolicy> MixedPolicies(int q_heads) {
  std::vector<AnyPolicy> mixed;
  for (const MethodSuite& suite : MethodSuites()) {
    const AnyPolicy own = suite.policies(32, q_heads).front();
    mixed.push_back(mixed.size() % 2 ? Corrected(own) : own);
    if (!HasField(own.common.kind, "share_heads")) continue;
    const std::vector<AnyPolicy> policies = suite.policies(64, q_heads);
    mixed.push_back(Corrected(Shared(policies[1 % policies.size()])));
  }
  return Thinned(mixed, 3);
}

void CompareSelect(const OpData& data, const AnyPolicy& policy, TieCount& ties) {
  SCOPED_TRACE(data.op().Describe() + "; " + Name(policy));
  const ExpectedMask expected(data.problem(), policy);
  for (const Engine& engine : OtherEngines()) {
    EXPECT_TRUE(expected.Agrees(Select(engine, data.problem(), policy), ties)) << engine.Name();
  }
}

} // namespace flashprefill::test
