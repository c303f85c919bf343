// Every CPU backend of this build, on every instruction set that the machine has, against the reference: select's masks
// bit for bit away from ties, attend's outputs on random masks, and prefill, which may fuse the two. A backend that is
// added is tested without a change here.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include "cases.h"
#include "compare.h"
#include "core/vertical_slash.h"
#include "engine.h"

namespace flashprefill::test {
namespace {

class Backends : public testing::Test {
 protected:
  void SetUp() override {
    if (OtherEngines().empty()) GTEST_SKIP() << "the reference is the only CPU backend of this build";
  }
};

std::string About(const OpCase& op, const AnyPolicy& policy) { return op.Describe() + "; " + Name(policy); }

void CompareSelect(const OpData& data, const AnyPolicy& policy, TieCount& ties) {
  SCOPED_TRACE(About(data.op(), policy));
  const ExpectedMask expected(data.problem(), policy);
  for (const Engine& engine : OtherEngines()) {
    EXPECT_TRUE(expected.Agrees(Select(engine, data.problem(), policy), ties)) << engine.Name();
  }
}

void CompareAttend(const OpData& data, const Mask& mask) {
  SCOPED_TRACE(data.op().Describe() + "; blocks of " + std::to_string(mask.view.block_size) +
               (mask.view.share_heads ? ", shared" : "") + (mask.view.mean_correction ? ", corrected" : ""));
  const Attended expected = Attend(Reference(), data.problem(), mask);
  for (const Engine& engine : OtherEngines()) {
    const Attended actual = Attend(engine, data.problem(), mask, 2, data.op().out_strides);
    EXPECT_TRUE(Close(data.problem(), expected, actual)) << engine.Name();
  }
}

// A block size for the i-th case of a list: over a list all kinds occur.
int BlockSize(size_t i) {
  constexpr int kSizes[] = {64, 16, 128, 48, 32, 1024};
  return kSizes[i % std::size(kSizes)];
}

void SelectOver(const std::vector<OpCase>& cases, size_t policies_per_case) {
  TieCount ties;
  size_t next = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    const OpData data(cases[i]);
    const std::vector<AnyPolicy> policies = ScoringPolicies(BlockSize(i));
    for (size_t j = 0; j < policies_per_case; ++j) CompareSelect(data, policies[next++ % policies.size()], ties);
    CompareSelect(data, Streaming(BlockSize(i), 1, 2, 1), ties);
  }
  ties.Print();
}

// Policies of heads: rules that go by a number of rows or keys meet all lengths, the pooled ones all dtypes.
void SelectByHeadOver(const std::vector<OpCase>& cases, size_t policies_per_case) {
  TieCount ties;
  size_t next = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    const OpData data(cases[i]);
    const int block_size = std::min(BlockSize(i), 128); // larger ones have hardly two blocks here
    const std::vector<AnyPolicy> policies = HeadPolicies(block_size);
    for (size_t j = 0; j < policies_per_case; ++j) CompareSelect(data, policies[next++ % policies.size()], ties);
    std::vector<fp_minference_head> heads;
    for (int h = 0; h < data.problem().q_heads; ++h) {
      const fp_minference_head kinds[] = {{FP_BLOCK_SPARSE, 2, 0}, {FP_A_SHAPE, 40, 70}, {FP_VERTICAL_SLASH, 40, 60}};
      heads.push_back(kinds[h % 3]);
    }
    CompareSelect(data, MInference(block_size, heads), ties);
  }
  ties.Print();
}

void AttendOver(const std::vector<OpCase>& cases, double density = 0.5) {
  for (size_t i = 0; i < cases.size(); ++i) {
    const OpData data(cases[i]);
    const fp_problem& p = data.problem();
    CompareAttend(data, RandomMask(p, BlockSize(i), false, false, density, i));
    CompareAttend(data, RandomMask(p, BlockSize(i + 1), false, true, density, i + 1000));
    CompareAttend(data, RandomMask(p, BlockSize(i + 2), true, i % 2, density, i + 2000));
  }
}

TEST_F(Backends, SelectLengths) { SelectOver(Thinned(LengthCases()), 7); }
TEST_F(Backends, SelectHeads) { SelectOver(Thinned(HeadCases()), 3); }
TEST_F(Backends, SelectDtypes) { SelectOver(Thinned(DtypeCases()), 7); }
TEST_F(Backends, SelectLayouts) { SelectOver(Thinned(LayoutCases()), 3); }
TEST_F(Backends, SelectStrides) { SelectOver(Thinned(StrideCases()), 3); }
TEST_F(Backends, SelectFar) { SelectOver(FarCases(), 4); }
TEST_F(Backends, SelectPeaked) { SelectOver(Thinned(PeakedCases()), 20); }

TEST_F(Backends, SelectByHeadLengths) { SelectByHeadOver(Thinned(LengthCases()), 9); }
TEST_F(Backends, SelectByHeadHeads) { SelectByHeadOver(Thinned(HeadCases()), 2); }
TEST_F(Backends, SelectByHeadDtypes) { SelectByHeadOver(Thinned(DtypeCases()), 4); }
TEST_F(Backends, SelectByHeadLayouts) { SelectByHeadOver(Thinned(LayoutCases()), 2); }
TEST_F(Backends, SelectByHeadStrides) { SelectByHeadOver(Thinned(StrideCases()), 2); }
TEST_F(Backends, SelectByHeadFar) { SelectByHeadOver(FarCases(), 3); }
TEST_F(Backends, SelectByHeadPeaked) { SelectByHeadOver(Thinned(PeakedCases()), 9); }

// Lines of tokens: the lists agree but for a few tokens near their threshold, and attention over any of them is the
// same.
TEST_F(Backends, Lines) {
  std::vector<OpCase> cases;
  for (const auto& list : {LengthCases(), DtypeCases(), LayoutCases(), StrideCases(), HeadCases()}) {
    cases.insert(cases.end(), list.begin(), list.end());
  }
  cases = Thinned(cases);
  for (size_t i = 0; i < cases.size(); ++i) {
    const OpData data(cases[i]);
    const fp_problem& p = data.problem();
    const AnyPolicy policy = WithForced(InTokens(MInference(BlockSize(i), 35 + i % 7, 50 + i % 90)), i % 2, i % 3, 0);
    SCOPED_TRACE(About(data.op(), policy));
    const Mask expected = Select(Reference(), p, policy);
    const Attended attended = Attend(Reference(), p, expected);
    for (const Engine& engine : OtherEngines()) {
      const Mask actual = Select(engine, p, policy);
      EXPECT_EQ(actual.bits, expected.bits) << engine.Name();
      EXPECT_EQ(actual.fallback, expected.fallback) << engine.Name();
      const int64_t stride = VerticalSlashStride(expected.view);
      for (int b = 0; stride > 0 && b < p.batch; ++b) {
        for (int h = 0; h < p.q_heads; ++h) {
          const int32_t* want = VerticalSlashAt(expected.view, b, h);
          const int32_t* have = VerticalSlashAt(actual.view, b, h);
          ASSERT_EQ(want[0], have[0]) << engine.Name();
          ASSERT_EQ(want[1], have[1]) << engine.Name();
          const std::set<int32_t> columns(want + 2, want + 2 + want[0]);
          const std::set<int32_t> distances(want + 2 + expected.view.max_verticals,
                                            want + 2 + expected.view.max_verticals + want[1]);
          int missing = 0;
          for (int64_t j = 0; j < have[0]; ++j) missing += !columns.count(have[2 + j]);
          for (int64_t j = 0; j < have[1]; ++j) missing += !distances.count(have[2 + expected.view.max_verticals + j]);
          EXPECT_LE(missing, 1 + stride / 100) << engine.Name();
        }
      }
      EXPECT_TRUE(Close(p, attended, Attend(engine, p, expected, 2, data.op().out_strides))) << engine.Name();
      const Prefilled both = Prefill(engine, p, policy, 2, data.op().out_strides);
      EXPECT_TRUE(Close(p, Attend(Reference(), p, both.mask), both.attended)) << engine.Name();
    }
  }
}

TEST_F(Backends, SelectLong) {
  TieCount ties;
  for (const OpCase& op : Thinned(LongCases(), 2)) {
    const OpData data(op);
    CompareSelect(data, AnyPolicy(FP_FLASHPREFILL), ties);
    CompareSelect(data, AnyPolicy(FP_SKETCH), ties);
    CompareSelect(data, FlashPrefill(16, 0.5f, 16), ties); // 256 blocks: four words a row
    CompareSelect(data, Shared(FlashPrefill(64, 0.5f)), ties);
    CompareSelect(data, AnyPolicy(FP_FLEXPREFILL), ties);
    CompareSelect(data, FlexPrefill(16, 0.8f, 1), ties);
    CompareSelect(data, MInference(64, 100, 300), ties);
  }
  ties.Print();
}

TEST_F(Backends, SelectDense) {
  TieCount ties;
  OpCase open; // without causal, keys may be fewer than queries
  open.lengths = {{130, 70}, {130, 0}, {130, 300}};
  open.k_layout = Layout::kPacked;
  open.causal = false;
  for (const OpCase& op : {open, LengthCases()[3], LayoutCases()[0]}) {
    const OpData data(op);
    CompareSelect(data, Dense(64), ties);
    CompareSelect(data, Shared(Dense(16)), ties);
  }
}

// Scores that are not finite speak for nobody, the others decide as always.
TEST_F(Backends, SelectWithNanAndInf) {
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
    data.SetKey(data.problem().k, s, 500, 0, 63, -std::numeric_limits<float>::infinity());
    data.SetQuery(s, 20, 0, 7, NAN);
    data.SetQuery(s, 77, 1, 9, std::numeric_limits<float>::infinity());
    for (const int pool : {1, 16}) {
      CompareSelect(data, FlashPrefill(64, 0.5f, pool), ties);
      CompareSelect(data, Shared(FlashPrefill(32, 0.5f, pool)), ties);
      CompareSelect(data, SketchByAlpha(64, 0.5f, 0, pool), ties);
    }
  }
  ties.Print();
}

TEST_F(Backends, AttendLengths) { AttendOver(Thinned(LengthCases())); }
TEST_F(Backends, AttendHeads) { AttendOver(Thinned(HeadCases())); }
TEST_F(Backends, AttendDtypes) { AttendOver(Thinned(DtypeCases())); }
TEST_F(Backends, AttendLayouts) { AttendOver(Thinned(LayoutCases())); }
TEST_F(Backends, AttendStrides) { AttendOver(Thinned(StrideCases())); }
TEST_F(Backends, AttendFar) { AttendOver(FarCases()); }
TEST_F(Backends, AttendPeaked) { AttendOver(Thinned(PeakedCases()), 0.3); }

TEST_F(Backends, AttendEverything) {
  for (const OpCase& op : Thinned(LengthCases())) {
    const OpData data(op);
    CompareAttend(data, RandomMask(data.problem(), 64, false, false, 1.0, 1));
    CompareAttend(data, RandomMask(data.problem(), 128, true, true, 1.0, 1));
  }
}

TEST_F(Backends, AttendLittle) {
  for (const OpCase& op : Thinned(LengthCases())) {
    const OpData data(op);
    CompareAttend(data, RandomMask(data.problem(), 64, false, false, 0.05, 2));
    CompareAttend(data, RandomMask(data.problem(), 32, true, true, 0.05, 3));
    CompareAttend(data, RandomMask(data.problem(), 16, false, true, 0.0, 4));
  }
}

TEST_F(Backends, AttendLong) {
  for (const OpCase& op : Thinned(LongCases(), 2)) {
    const OpData data(op);
    CompareAttend(data, RandomMask(data.problem(), 128, false, true, 0.2, 5));
    CompareAttend(data, RandomMask(data.problem(), 64, true, false, 0.2, 6));
  }
}

TEST_F(Backends, AttendWithoutCausal) {
  OpCase op;
  op.lengths = {{130, 70}, {130, 0}, {130, 300}, {130, 128}};
  op.k_layout = Layout::kPacked;
  op.causal = false;
  op.kv_heads = 2;
  op.group = 3;
  for (const int32_t dtype : Thinned<int32_t>({FP_F32, FP_BF16, FP_F16})) {
    const OpData data(op.AllDtypes(dtype));
    for (const bool corrected : {false, true}) {
      CompareAttend(data, RandomMask(data.problem(), 64, false, corrected, 0.5, 7));
      CompareAttend(data, RandomMask(data.problem(), 16, true, corrected, 0.5, 8));
      CompareAttend(data, RandomMask(data.problem(), 128, false, corrected, 1.0, 9));
    }
  }
}

TEST_F(Backends, AttendWithOtherScales) {
  for (const float scale : {1e-3f, 0.5f, 2.0f}) {
    OpCase op;
    op.lengths = {{200, 500}};
    op.softmax_scale = scale;
    const OpData data(op);
    CompareAttend(data, RandomMask(data.problem(), 64, false, true, 0.5, 10));
  }
}

TEST_F(Backends, Prefill) {
  TieCount ties;
  std::vector<OpCase> cases;
  for (const auto& list : {LengthCases(), DtypeCases(), PeakedCases(), LayoutCases()}) {
    cases.insert(cases.end(), list.begin(), list.end());
  }
  cases = Thinned(cases, 6);
  for (size_t i = 0; i < cases.size(); ++i) {
    const OpData data(cases[i]);
    const fp_problem& p = data.problem();
    const std::vector<AnyPolicy> scoring = ScoringPolicies(BlockSize(i));
    AnyPolicy policy = scoring[i % scoring.size()];
    if (i % 3 != 0) policy = Corrected(policy);
    SCOPED_TRACE(About(data.op(), policy));
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
