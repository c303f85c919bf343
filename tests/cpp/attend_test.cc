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

class Attends : public testing::Test {
 protected:
  void SetUp() override {
    if (OtherEngines().empty()) GTEST_SKIP() << "the reference is the only CPU backend of this build";
  }
};

void CompareAttend(const OpData& data, const Mask& mask) {
  SCOPED_TRACE(data.op().Describe() + "; blocks of " + std::to_string(mask.view.block_size) +
               (mask.view.share_heads ? ", shared" : "") + (mask.view.mean_correction ? ", corrected" : ""));
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
  }
}

TEST_F(Attends, Long) {
  for (const OpCase& op : Thinned(LongCases(), 2)) {
    const OpData data(op);
    CompareAttend(data, RandomMask(data.problem(), 128, false, true, 0.2, 5));
    CompareAttend(data, RandomMask(data.problem(), 64, true, false, 0.2, 6));
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
    for (const bool corrected : {false, true}) {
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
  Mask first_and_last(data.problem(), Corrected(Streaming(16, 0, 0, 0)).get());
  std::fill(first_and_last.bits.begin(), first_and_last.bits.end(), 0b1001);
  Mask first = first_and_last;
  std::fill(first.bits.begin(), first.bits.end(), 0b0001);
  for (const Engine& engine : AllEngines()) {
    SCOPED_TRACE(engine.Name());
    const Attended a = Attend(engine, data.problem(), first_and_last);
    // P = 48: row 0 sees block 0 (16 x 1), its own key (1), block 1 by its means (16 x 3, value 2.5), block 2 (16 x 1).
    EXPECT_NEAR(a.lse[0], std::log(16.0 + 1 + 48 + 16), 1e-5);
    EXPECT_NEAR(a.out[0], (16 + 1 + 48 * 2.5 + 16) / 81, 1e-5);
    // Block 3 is the rows' own diagonal, which is never corrected: without its bit it is gone.
    EXPECT_NEAR(Attend(engine, data.problem(), first).lse[0], std::log(16.0 + 48 + 16), 1e-5);
  }
}

} // namespace
} // namespace flashprefill::test
