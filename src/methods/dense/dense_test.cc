// Dense: masks that keep everything, with causal and without.
#include <gtest/gtest.h>

#include "by_hand.h"
#include "cases.h"
#include "method_suite.h"

namespace flashprefill::test {
namespace {

std::vector<AnyPolicy> Policies(int block_size, int) { return {Dense(block_size), Shared(Dense(block_size))}; }

const RegisterSuite suite({.method = "dense", .policies = Policies});

TEST(Dense, WithoutCausalKeysMayBeFewerThanQueries) {
  TieCount ties;
  OpCase op;
  op.lengths = {{130, 70}, {130, 0}, {130, 300}};
  op.k_layout = Layout::kPacked;
  op.causal = false;
  const OpData data(op);
  for (const AnyPolicy& policy : {Dense(64), Shared(Dense(16))}) CompareSelect(data, policy, ties);
}

TEST(Dense, IsAFallback) {
  OpData data(OneDimension({512, 512}));
  for (const Engine& engine : AllEngines()) {
    const Mask dense = Select(engine, data.problem(), Dense());
    EXPECT_EQ(dense.fallback[0], FP_FALLBACK_DENSE) << engine.Name();
    EXPECT_EQ(Kept(dense, 2), (Blocks{0, 1, 2})) << engine.Name();
  }
}

} // namespace
} // namespace flashprefill::test
