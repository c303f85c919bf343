// What every method passes: masks of each CPU backend of this build, on every instruction set that the machine has,
// against the reference, bit for bit away from ties. A method or a backend that is added is tested without a change
// here.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

#include "cases.h"
#include "core/error.h"
#include "core/method.h"
#include "core/validate.h"
#include "method_suite.h"

namespace flashprefill::test {

void PrintTo(const MethodSuite& suite, std::ostream* os) { *os << suite.method; }

namespace {

class Masks : public testing::TestWithParam<MethodSuite> {
 protected:
  void SetUp() override {
    if (OtherEngines().empty()) GTEST_SKIP() << "the reference is the only CPU backend of this build";
  }

  size_t All() const { return GetParam().policies(64, 1).size(); }
  size_t Many() const { return GetParam().many > 0 ? GetParam().many : All(); }
  size_t Few() const { return GetParam().few > 0 ? GetParam().few : (All() + 1) / 2; }

  // Each case with the next few of the policies. Block sizes go round from case to case, so that over a list all
  // combinations occur.
  void CompareOver(const std::vector<OpCase>& cases, size_t policies_per_case) const {
    constexpr int kSizes[] = {64, 16, 128, 48, 32, 1024};
    TieCount ties;
    size_t next = 0;
    for (size_t i = 0; i < cases.size(); ++i) {
      OpCase op = cases[i];
      if (op.softmax_scale == 0) op.softmax_scale = GetParam().scale;
      const OpData data(op);
      const auto policies = GetParam().policies(kSizes[i % std::size(kSizes)], data.problem().q_heads);
      for (size_t j = 0; j < policies_per_case; ++j) CompareSelect(data, policies[next++ % policies.size()], ties);
      if (i % std::size(kSizes) == std::size(kSizes) - 1) ++next; // so that another policy meets each size
    }
    ties.Print();
  }
};

TEST_P(Masks, Lengths) { CompareOver(Thinned(LengthCases()), Many()); }
TEST_P(Masks, Heads) { CompareOver(Thinned(HeadCases()), Few()); }
TEST_P(Masks, Dtypes) { CompareOver(Thinned(DtypeCases()), Many()); }
TEST_P(Masks, Layouts) { CompareOver(Thinned(LayoutCases()), Few()); }
TEST_P(Masks, Strides) { CompareOver(Thinned(StrideCases()), Few()); }
TEST_P(Masks, Far) { CompareOver(FarCases(), Few()); }
TEST_P(Masks, Peaked) { CompareOver(Thinned(PeakedCases()), All()); }
TEST_P(Masks, Long) { CompareOver(Thinned(LongCases(), 2), Few()); }

TEST_P(Masks, LongByDefault) {
  TieCount ties;
  for (const OpCase& op : Thinned(LongCases(), 2)) CompareSelect(OpData(op), Parse(GetParam().method), ties);
  ties.Print();
}

// Scores that are not finite are ignored, the others decide as always.
TEST_P(Masks, NanAndInf) {
  TieCount ties;
  for (const int32_t dtype : {FP_F32, FP_BF16, FP_F16}) {
    OpCase op;
    op.lengths = {{200, 900}};
    op.group = 2;
    op.values = Values::kStructured;
    op.AllDtypes(dtype);
    OpData data(op);
    const Sequence s = data.sequence(0);
    data.SetKey(data.problem().k, s, 3, 0, 0, NAN);
    data.SetKey(data.problem().k, s, 300, 0, 5, std::numeric_limits<float>::infinity());
    data.SetKey(data.problem().k, s, 899, 0, 63, -std::numeric_limits<float>::infinity());
    data.SetQuery(s, 20, 0, 7, NAN);
    data.SetQuery(s, 199, 1, 9, std::numeric_limits<float>::infinity());
    for (const AnyPolicy& policy : GetParam().policies(64, data.problem().q_heads)) CompareSelect(data, policy, ties);
  }
  ties.Print();
}

// Where every query sees every key: as many keys as queries, fewer, more, none. A method either selects there or is
// refused.
TEST_P(Masks, WithoutCausality) {
  const MethodSuite& suite = GetParam();
  if (const AnyPolicy policy = Parse(suite.method); !MethodOf(policy.common).without_causal) {
    OpCase op;
    op.causal = false;
    const auto validate = [&] { ValidatePolicy(policy.get(), OpData(op).problem()); };
    if (MethodOf(policy.common).selects) {
      EXPECT_THROW(validate(), Error);
    }
    return;
  }
  std::vector<OpCase> cases = Thinned(MixedCases(), 3);
  OpCase several;
  several.lengths = {{300, 700}, {520, 140}, {70, 0}, {1, 1100}, {900, 900}};
  several.q_layout = several.k_layout = Layout::kPacked;
  several.kv_heads = several.group = 2;
  several.values = Values::kStructured;
  cases.push_back(several);
  TieCount ties;
  for (OpCase op : cases) {
    op.causal = false;
    if (op.softmax_scale == 0) op.softmax_scale = suite.scale;
    const OpData data(op);
    for (AnyPolicy policy : suite.policies(64, data.problem().q_heads)) {
      policy.common.window_blocks = std::min(policy.common.window_blocks, 1);
      policy.common.dense_tail_blocks = 0;
      CompareSelect(data, policy, ties);
      for (const Engine& engine : OtherEngines()) {
        const Prefilled result = Prefill(engine, data.problem(), policy);
        EXPECT_TRUE(Close(data.problem(), result.attended, Attend(engine, data.problem(), result.mask)));
      }
    }
  }
  ties.Print();
}

TEST_P(Masks, SameBitsWhateverTheThreads) {
  OpCase op;
  op.lengths = {{700, 1900}, {700, 900}};
  op.k_layout = Layout::kPacked;
  op.kv_heads = 2;
  op.group = 3;
  op.values = Values::kStructured;
  const OpData data(op);
  for (const AnyPolicy& policy : GetParam().policies(64, data.problem().q_heads)) {
    for (const Engine& engine : OtherEngines()) {
      EXPECT_TRUE(SameMask(data.problem(), Select(engine, data.problem(), policy, 1),
                           Select(engine, data.problem(), policy, 5)))
          << engine.Name() << ", " << Name(policy);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Methods, Masks, testing::ValuesIn(MethodSuites()),
                         [](const auto& info) { return info.param.method; });

} // namespace
} // namespace flashprefill::test
