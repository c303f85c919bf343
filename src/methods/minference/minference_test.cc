// MInference: the policies that are compared with the reference, and arithmetic done by hand. See by_hand.h for what
// inputs are.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <set>
#include <string>

#include "by_hand.h"
#include "cases.h"
#include "core/vertical_slash.h"
#include "method_suite.h"

namespace flashprefill::test {
namespace {

AnyPolicy MInference(int block_size, int vertical, int slash) {
  AnyPolicy policy = Parse("minference", block_size);
  policy.As<fp_minference>().vertical = vertical;
  policy.As<fp_minference>().slash = slash;
  return policy;
}

// One pattern for each query head.
AnyPolicy MInference(int block_size, const std::vector<fp_minference_head>& heads) {
  std::string rows;
  for (const fp_minference_head& head : heads) {
    rows += (rows.empty() ? "[" : ", [") + std::to_string(head.pattern) + ", " + std::to_string(head.a) + ", " +
            std::to_string(head.b) + "]";
  }
  return Parse("minference(heads=[" + rows + "])", block_size);
}

// Verticals and slashes of tokens in place of the blocks that hold them.
AnyPolicy InTokens(AnyPolicy policy) {
  policy.As<fp_minference>().rounding = FP_ROUND_TOKENS;
  return policy;
}

std::vector<AnyPolicy> Policies(int block_size, int q_heads) {
  block_size = std::min(block_size, 128); // the cases have hardly two of larger blocks
  std::vector<fp_minference_head> heads;
  for (int h = 0; h < q_heads; ++h) {
    const fp_minference_head kinds[] = {{FP_BLOCK_SPARSE, 2, 0}, {FP_A_SHAPE, 40, 70}, {FP_VERTICAL_SLASH, 40, 60}};
    heads.push_back(kinds[h % 3]);
  }
  return {
      MInference(block_size, 33, 0),
      MInference(block_size, heads),
      MInference(block_size, 0, 105),
      WithForced(MInference(block_size, 60, 120), 0, 2, 1),
  };
}

const RegisterSuite suite({.method = "minference", .policies = Policies});

// The verticals and slashes of two masks have the same numbers, and differ in a few near their threshold at most.
void ExpectNearlyTheSame(const fp_problem& p, const Mask& expected, const Mask& actual) {
  const int64_t stride = VerticalSlashStride(expected.view), room = expected.view.max_verticals;
  for (int b = 0; stride > 0 && b < p.batch; ++b) {
    for (int h = 0; h < p.q_heads; ++h) {
      const int32_t* want = VerticalSlashAt(expected.view, b, h);
      const int32_t* have = VerticalSlashAt(actual.view, b, h);
      ASSERT_EQ(want[0], have[0]);
      ASSERT_EQ(want[1], have[1]);
      const std::set<int32_t> verticals(want + 2, want + 2 + want[0]);
      const std::set<int32_t> slashes(want + 2 + room, want + 2 + room + want[1]);
      int missing = 0;
      for (int64_t j = 0; j < have[0]; ++j) missing += !verticals.count(have[2 + j]);
      for (int64_t j = 0; j < have[1]; ++j) missing += !slashes.count(have[2 + room + j]);
      EXPECT_LE(missing, 1 + stride / 100);
    }
  }
}

// In tokens: the lists agree but for a few tokens near their threshold, and attention over any of them is the same.
TEST(MInference, InTokens) {
  constexpr int kSizes[] = {64, 16, 128, 48, 32, 1024};
  std::vector<OpCase> cases;
  for (const auto& list : {LengthCases(), DtypeCases(), LayoutCases(), StrideCases(), HeadCases()}) {
    cases.insert(cases.end(), list.begin(), list.end());
  }
  cases = Thinned(cases);
  for (size_t i = 0; i < cases.size(); ++i) {
    const OpData data(cases[i]);
    const fp_problem& p = data.problem();
    const AnyPolicy policy = WithForced(InTokens(MInference(kSizes[i % std::size(kSizes)], static_cast<int>(35 + i % 7),
                                                            static_cast<int>(50 + i % 90))),
                                        i % 2, i % 3, 0);
    const Mask expected = Select(Reference(), p, policy);
    const Attended attended = Attend(Reference(), p, expected);
    for (const Engine& engine : OtherEngines()) {
      SCOPED_TRACE(engine.Name() + ": " + data.op().Describe() + "; " + Name(policy));
      const Mask actual = Select(engine, p, policy);
      EXPECT_EQ(actual.bits, expected.bits);
      EXPECT_EQ(actual.fallback, expected.fallback);
      ExpectNearlyTheSame(p, expected, actual);
      EXPECT_TRUE(Close(p, attended, Attend(engine, p, expected, 2, data.op().out_strides)));
      const Prefilled both = Prefill(engine, p, policy, 2, data.op().out_strides);
      EXPECT_TRUE(Close(p, Attend(Reference(), p, both.mask), both.attended));
    }
  }
}

// ---------------------------------------------------------------- by hand

// 512 keys that weigh the same but for key 200, which has e^8: the last 64 rows, 448 to 511, see it with nearly all of
// their softmax.
OpData OneHeavyKey() {
  OpData data(OneDimension({512, 512}));
  SetWeights(data, 512, {1});
  data.SetKey(data.problem().k, data.sequence(0), 200, 0, 0, 8);
  return data;
}

TEST(MInferenceByHand, VerticalAndSlash) {
  const OpData data = OneHeavyKey();
  // 31 verticals: the first 30 and 200, in blocks 0 and 3 of 64. 50 slashes, the nearest: a tile's keys begin 49 before
  // it, in the block before its own two.
  ExpectTiles(data, MInference(64, 31, 50), {{0, 1}, {0, 1, 2, 3}, {0, 3, 4, 5}, {0, 3, 5, 6, 7}});
  // 101 slashes: the nearest 100 and the best other. Row p sees key 200 at distance p - 200 with the share
  // e^8 / (e^8 + p), so that is 448 - 200 = 248. Tile 2 reaches back to 256 - 99 = 157, in block 2, and 248 before it
  // are keys 8 to 135, blocks 0 to 2. Tile 3: 285, block 4, and 136 to 263, blocks 2 to 4.
  ExpectTiles(data, MInference(64, 0, 101), {{0, 1}, {0, 1, 2, 3}, {0, 1, 2, 3, 4, 5}, {0, 2, 3, 4, 5, 6, 7}});
}

TEST(MInferenceByHand, AShape) {
  const OpData data = OneHeavyKey();
  const std::vector<fp_minference_head> heads = {{FP_A_SHAPE, 100, 70}};
  // The first 100 tokens are blocks 0 and 1; the nearest 70 of tile m's first row begin at 128 m - 69.
  ExpectTiles(data, MInference(64, heads), {{0, 1}, {0, 1, 2, 3}, {0, 1, 2, 3, 4, 5}, {0, 1, 4, 5, 6, 7}});
}

TEST(MInferenceByHand, BlockSparse) {
  OpData data(OneDimension({512, 512}));
  SetWeights(data, 64, {1, 8, 2, 1, 3, 1, 1, 1});
  const std::vector<fp_minference_head> heads = {{FP_BLOCK_SPARSE, 2, 0}};
  // Two blocks of queries per tile, two blocks of keys each: 0 and 0, 1; then 1, 2 twice; from row 4 on, 1 and 4.
  ExpectTiles(data, MInference(64, heads), {{0, 1}, {1, 2, 3}, {1, 4, 5}, {1, 4, 6, 7}});
}

TEST(MInferenceByHand, EachHeadHasItsOwnPattern) {
  OpData data(OneDimension({512, 512}, 2));
  SetWeights(data, 64, {1, 8, 2, 1, 3, 1, 1, 1});
  const std::vector<fp_minference_head> heads = {{FP_BLOCK_SPARSE, 2, 0}, {FP_A_SHAPE, 1, 1}};
  const Mask mask = Select(AllEngines().front(), data.problem(), MInference(64, heads));
  EXPECT_EQ(Kept(mask, 3), (Blocks{1, 4, 6, 7}));
  EXPECT_EQ(Kept(mask, mask.view.tile_rows + 3), (Blocks{0, 6, 7}));
}

TEST(MInferenceByHand, VerticalsAndSlashesOfTokens) {
  OpData data = OneHeavyKey();
  const Sequence s = data.sequence(0);
  for (int64_t t = 0; t < 512; ++t) data.SetKey(data.problem().v, s, t, 0, 0, t == 200 ? 100 : t < 30 ? 1 : 0);
  // 31 verticals, 0 to 29 and 200, and slashes 0 to 49. The mask's blocks are the diagonal's alone: tile 3, rows 384 to
  // 511, has blocks 6 and 7, and the slashes add keys 335 to 383, the verticals theirs: 49 + 31 keys are a block and
  // a part of one, rounded up to 2.
  const AnyPolicy policy = InTokens(MInference(64, 31, 50));
  for (const Engine& engine : AllEngines()) {
    const Mask mask = Select(engine, data.problem(), policy);
    EXPECT_EQ(mask.view.max_verticals, 31);
    EXPECT_EQ(mask.view.max_slashes, 50);
    std::vector<int32_t> lists = {31, 50};
    for (int t = 0; t < 30; ++t) lists.push_back(t);
    lists.push_back(200);
    for (int d = 0; d < 50; ++d) lists.push_back(d);
    EXPECT_EQ(mask.vertical_slash, lists) << engine.Name();
    EXPECT_EQ(Kept(mask, 3), (Blocks{6, 7})) << engine.Name();
    EXPECT_EQ(mask.counts[3], 4) << engine.Name();
    // Row 400 attends to 335..400, 0..29 with value 1 and 200 with value 100 and weight e^8.
    const Attended a = Attend(engine, data.problem(), mask);
    const double weights = 66 + 30 + std::exp(8);
    EXPECT_NEAR(a.out[400], (30 + 100 * std::exp(8)) / weights, 1e-3) << engine.Name();
    EXPECT_NEAR(a.lse[400], std::log(weights), 1e-5) << engine.Name();
    // Row 10 sees no further than itself, whatever vertical there is.
    EXPECT_NEAR(a.lse[10], std::log(11.0), 1e-5) << engine.Name();
  }
}

TEST(MInferenceByHand, ShortSequencesKeepEverything) {
  const OpData data = OneHeavyKey();
  EXPECT_EQ(Select(Reference(), data.problem(), MInference(64, 512, 50)).fallback[0], FP_FALLBACK_SHORT);
  EXPECT_EQ(Select(Reference(), data.problem(), MInference(64, 30, 512)).fallback[0], FP_FALLBACK_SHORT);
  EXPECT_EQ(Select(Reference(), data.problem(), MInference(64, 511, 511)).fallback[0], FP_SELECTED);
}

} // namespace
} // namespace flashprefill::test
