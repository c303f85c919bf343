// Masks of every backend and instruction set against the reference, over lists of cases and of policies.
#ifndef FLASHPREFILL_TESTS_COMPARE_SELECT_H_
#define FLASHPREFILL_TESTS_COMPARE_SELECT_H_

#include <gtest/gtest.h>

#include <cmath>
#include <iterator>
#include <limits>
#include <vector>

#include "compare.h"
#include "engine.h"

namespace flashprefill::test {

inline void CompareSelect(const OpData& data, AnyPolicy policy, TieCount& ties) {
  if (policy.common.kind == FP_XATTENTION && policy.xattention.head_thresholds) {
    policy.xattention.head_count = data.problem().q_heads;
  }
  SCOPED_TRACE(data.op().Describe() + "; " + Name(policy));
  const ExpectedMask expected(data.problem(), policy);
  for (const Engine& engine : OtherEngines()) {
    EXPECT_TRUE(expected.Agrees(Select(engine, data.problem(), policy), ties)) << engine.Name();
  }
}

// Each case with the next few of the policies for a block size, which goes round from case to case: over a list all
// kinds occur. scale: of the cases that don't say one; above head_dim^-1/2 it makes scores peaked.
template <typename Policies>
void CompareOver(const std::vector<OpCase>& cases, const Policies& policies_for, size_t policies_per_case,
                 float scale = 0) {
  constexpr int kSizes[] = {64, 16, 128, 48, 32, 1024};
  TieCount ties;
  size_t next = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    OpCase op = cases[i];
    if (op.softmax_scale == 0) op.softmax_scale = scale;
    const OpData data(op);
    const std::vector<AnyPolicy> policies = policies_for(kSizes[i % std::size(kSizes)]);
    for (size_t j = 0; j < policies_per_case; ++j) CompareSelect(data, policies[next++ % policies.size()], ties);
  }
  ties.Print();
}

// Scores that are not finite speak for nobody, the others decide as always.
inline void CompareWithNanAndInf(const std::vector<AnyPolicy>& policies) {
  TieCount ties;
  for (const int32_t dtype : {FP_F32, FP_BF16, FP_F16}) {
    OpCase op;
    op.lengths = {{200, 900}};
    op.group = 2;
    op.AllDtypes(dtype);
    OpData data(op);
    const Sequence s = data.sequence(0);
    data.SetKey(data.problem().k, s, 3, 0, 0, NAN);
    data.SetKey(data.problem().k, s, 300, 0, 5, std::numeric_limits<float>::infinity());
    data.SetKey(data.problem().k, s, 899, 0, 63, -std::numeric_limits<float>::infinity());
    data.SetQuery(s, 20, 0, 7, NAN);
    data.SetQuery(s, 199, 1, 9, std::numeric_limits<float>::infinity());
    for (const AnyPolicy& policy : policies) CompareSelect(data, policy, ties);
  }
  ties.Print();
}

// The same bits, however many threads there are.
inline void CompareThreads(const std::vector<AnyPolicy>& policies) {
  OpCase op;
  op.lengths = {{700, 1900}, {700, 900}};
  op.k_layout = Layout::kPacked;
  op.kv_heads = 2;
  op.group = 3;
  op.values = Values::kStructured;
  const OpData data(op);
  for (const AnyPolicy& policy : policies) {
    for (const Engine& engine : OtherEngines()) {
      EXPECT_TRUE(SameMask(data.problem(), Select(engine, data.problem(), policy, 1),
                           Select(engine, data.problem(), policy, 5)))
          << engine.Name() << ", " << Name(policy);
    }
  }
}

} // namespace flashprefill::test

#endif // FLASHPREFILL_TESTS_COMPARE_SELECT_H_
