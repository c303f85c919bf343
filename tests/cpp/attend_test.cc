// Attention over a given mask: outputs of each CPU backend of this build, on every instruction set that the machine
// has, against the reference's on random masks, and arithmetic done by hand for every backend.
#include <gtest/gtest.h>

#include <cmath>

#include "by_hand.h"
#include "cases.h"
#include "compare.h"
#include "engine.h"

namespace flashprefill::test {
namespace {

constexpr const char* kCorrections[] = {"", ", corrected", ", corrected by summary keys"};

class Attends : public testing::Test {
 protected:
  void SetUp() override {
    if (OtherEngines().empty()) GTEST_SKIP() << "the reference is the only CPU backend of this build";
  }
};

void CompareAttend(const OpData& data, const Mask& mask) {
  SCOPED_TRACE(data.op().Describe() + "; blocks of " + std::to_string(mask.view.block_size) +
               (mask.view.share_heads ? ", shared" : "") + kCorrections[mask.view.mean_correction]);
  const Attended expected = Attend(Reference(), data.problem(), mask);
  for (const Engine& engine : OtherEngines()) {
    const Attended actual = Attend(engine, data.problem(), mask, 2, data.op().out_strides);
    EXPECT_TRUE(Close(data.problem(), expected, actual)) << engine.Name();
  }
}

// A block size for the i-th case of a list: over a list all sizes occur.
int BlockSize(size_t i) {
  constexpr int kSizes[] = {64, 16, 128, 48, 32, 1024};
  return kSizes[i % std::size(kSizes)];
}

void AttendOver(const std::vector<OpCase>& cases, double density = 0.5) {
  for (size_t i = 0; i < cases.size(); ++i) {
    const OpData data(cases[i]);
    const fp_problem& p = data.problem();
    CompareAttend(data, RandomMask(p, BlockSize(i), false, false, density, i));
    CompareAttend(data, RandomMask(p, BlockSize(i + 1), false, true, density, i + 1000));
    CompareAttend(data, RandomMask(p, BlockSize(i + 2), true, i % 2, density, i + 2000));
    CompareAttend(data, RandomMask(p, i % 2 ? 16 : 32, false, FP_SUMMARY_KEYS, density, i + 3000));
    CompareAttend(data, RandomMask(p, i % 2 ? 48 : 16, true, FP_SUMMARY_KEYS, density, i + 4000));
  }
}

TEST_F(Attends, Lengths) { AttendOver(Thinned(LengthCases())); }
TEST_F(Attends, Heads) { AttendOver(Thinned(HeadCases())); }
TEST_F(Attends, Dtypes) { AttendOver(Thinned(DtypeCases())); }
TEST_F(Attends, Layouts) { AttendOver(Thinned(LayoutCases())); }
TEST_F(Attends, Strides) { AttendOver(Thinned(StrideCases())); }
TEST_F(Attends, Far) { AttendOver(FarCases()); }
TEST_F(Attends, Peaked) { AttendOver(Thinned(PeakedCases()), 0.3); }

TEST_F(Attends, Everything) {
  for (const OpCase& op : Thinned(LengthCases())) {
    const OpData data(op);
    CompareAttend(data, RandomMask(data.problem(), 64, false, false, 1.0, 1));
    CompareAttend(data, RandomMask(data.problem(), 128, true, true, 1.0, 1));
  }
}

TEST_F(Attends, Little) {
  for (const OpCase& op : Thinned(LengthCases())) {
    const OpData data(op);
    CompareAttend(data, RandomMask(data.problem(), 64, false, false, 0.05, 2));
    CompareAttend(data, RandomMask(data.problem(), 32, true, true, 0.05, 3));
    CompareAttend(data, RandomMask(data.problem(), 16, false, true, 0.0, 4));
    CompareAttend(data, RandomMask(data.problem(), 16, true, FP_SUMMARY_KEYS, 0.0, 5));
  }
}

TEST_F(Attends, Long) {
  for (const OpCase& op : Thinned(LongCases(), 2)) {
    const OpData data(op);
    CompareAttend(data, RandomMask(data.problem(), 128, false, true, 0.2, 5));
    CompareAttend(data, RandomMask(data.problem(), 64, true, false, 0.2, 6));
    CompareAttend(data, RandomMask(data.problem(), 16, true, FP_SUMMARY_KEYS, 0.2, 7)); // more columns than a chunk has
  }
}

TEST_F(Attends, WithoutCausal) {
  OpCase op;
  op.lengths = {{130, 70}, {130, 0}, {130, 300}, {130, 128}};
  op.k_layout = Layout::kPacked;
  op.causal = false;
  op.kv_heads = 2;
  op.group = 3;
  for (const int32_t dtype : Thinned<int32_t>({FP_F32, FP_BF16, FP_F16})) {
    const OpData data(op.AllDtypes(dtype));
    for (const int32_t corrected : {FP_NO_CORRECTION, FP_BLOCK_MEANS, FP_SUMMARY_KEYS}) {
      CompareAttend(data, RandomMask(data.problem(), 64, false, corrected, 0.5, 7));
      CompareAttend(data, RandomMask(data.problem(), 16, true, corrected, 0.5, 8));
      CompareAttend(data, RandomMask(data.problem(), 128, false, corrected, 1.0, 9));
    }
  }
}

TEST_F(Attends, WithOtherScales) {
  for (const float scale : {1e-3f, 0.5f, 2.0f}) {
    OpCase op;
    op.lengths = {{200, 500}};
    op.softmax_scale = scale;
    const OpData data(op);
    CompareAttend(data, RandomMask(data.problem(), 64, false, true, 0.5, 10));
  }
}

// ---------------------------------------------------------------- by hand

TEST(AttendByHand, AverageOfWhatARowSees) {
  OpData data(OneDimension({3, 3}));
  SetWeights(data, 16, {1});
  const Sequence s = data.sequence(0);
  for (int64_t t = 0; t < 3; ++t) data.SetKey(data.problem().v, s, t, 0, 0, static_cast<float>(t * 3));
  data.SetKey(data.problem().k, s, 2, 0, 0, static_cast<float>(std::log(2.0)));
  // Weights 1, 1, 2; values 0, 3, 6: 0; 3/2; (3 + 12) / 4.
  for (const Engine& engine : AllEngines()) {
    const Attended a = Prefill(engine, data.problem(), Dense(16)).attended;
    ExpectNear({0, 1.5, 3.75}, {a.out.begin(), a.out.end()});
    ExpectNear({0, std::log(2.0), std::log(4.0)}, {a.lse.begin(), a.lse.end()});
  }
}

TEST(AttendByHand, TheCorrectionCountsLeftOutBlocksByTheirMeans) {
  OpData data(OneDimension({16, 64}));
  SetWeights(data, 16, {1, 3, 1, 1});
  const Sequence s = data.sequence(0);
  for (int64_t t = 0; t < 64; ++t) data.SetKey(data.problem().v, s, t, 0, 0, t / 16 == 1 ? 2.0f + t % 2 : 1.0f);
  // All rows equal their mean query, for which a summary key is exact.
  for (const int32_t how : {FP_BLOCK_MEANS, FP_SUMMARY_KEYS}) {
    Mask first_and_last(data.problem(), Corrected(Streaming(16, 0, 0, 0), how).get());
    std::fill(first_and_last.bits.begin(), first_and_last.bits.end(), 0b1001);
    Mask first = first_and_last;
    std::fill(first.bits.begin(), first.bits.end(), 0b0001);
    for (const Engine& engine : AllEngines()) {
      SCOPED_TRACE(engine.Name());
      const Attended a = Attend(engine, data.problem(), first_and_last);
      // P = 48: row 0 sees block 0 (16 x 1), its own key (1), block 1 by its means (16 x 3, value 2.5), block 2 (16 x
      // 1).
      EXPECT_NEAR(a.lse[0], std::log(16.0 + 1 + 48 + 16), 1e-5);
      EXPECT_NEAR(a.out[0], (16 + 1 + 48 * 2.5 + 16) / 81, 1e-5);
      // Block 3 is the rows' own diagonal, which is never corrected: without its bit it is gone.
      EXPECT_NEAR(Attend(engine, data.problem(), first).lse[0], std::log(16.0 + 48 + 16), 1e-5);
    }
  }
}

// Where a tile is one row, summary keys are exact whatever the keys are, for each of a shared tile's heads.
TEST_F(Attends, SummaryKeysAreExactForTheMeanQuery) {
  OpCase op;
  op.lengths = {{1, 3000}};
  op.kv_heads = 2, op.group = 3;
  op.values = Values::kStructured;
  const OpData data(op);
  for (const bool shared : {false, true}) {
    const Mask mask = RandomMask(data.problem(), 16, shared, FP_BLOCK_MEANS, 0.1, 11);
    Mask summary = mask;
    summary.view.mean_correction = FP_SUMMARY_KEYS;
    for (const Engine& engine : AllEngines()) {
      EXPECT_TRUE(Close(data.problem(), Attend(engine, data.problem(), mask), Attend(engine, data.problem(), summary)))
          << engine.Name();
    }
  }
}

// A query that is not finite must not reach the other rows of its tile through their mean.
TEST_F(Attends, SummaryKeysOfATileWithANaN) {
  OpCase op;
  op.lengths = {{128, 800}};
  OpData data(op);
  data.SetQuery(data.sequence(0), 5, 0, 3, std::nanf(""));
  const Mask mask = RandomMask(data.problem(), 16, false, FP_SUMMARY_KEYS, 0.2, 12);
  const Attended expected = Attend(Reference(), data.problem(), mask);
  for (const Engine& engine : AllEngines()) {
    const Attended actual = Attend(engine, data.problem(), mask);
    for (size_t row = 0; row < 128; ++row) {
      if (row == 5) continue;
      EXPECT_NEAR(actual.lse[row], expected.lse[row], 1e-4) << engine.Name() << ", row " << row;
      EXPECT_NEAR(actual.out[row * 64], expected.out[row * 64], 1e-4) << engine.Name() << ", row " << row;
    }
  }
}

} // namespace
} // namespace flashprefill::test
