// XAttention: the policies that are compared with the reference, and arithmetic done by hand.
#include <gtest/gtest.h>

#include <cmath>

#include "by_hand.h"
#include "method_suite.h"

namespace flashprefill::test {
namespace {

// `norm` below 1 makes scores peaked.
AnyPolicy XAttention(int block_size, float threshold, int stride = 16, float norm = 1) {
  AnyPolicy policy = Parse("xattention", block_size);
  auto& fields = policy.As<fp_xattention>();
  fields.threshold = threshold;
  fields.stride = stride;
  fields.norm = norm;
  return policy;
}

AnyPolicy WithThresholds(int block_size, int q_heads) {
  static const float thresholds[128] = {0.9f, 0.2f, 0, 1, 0.5f, 0.7f, 0.3f}; // 0 for the other heads
  AnyPolicy policy = XAttention(block_size, 0.9f);
  policy.As<fp_xattention>().head_thresholds = thresholds;
  policy.As<fp_xattention>().head_count = q_heads;
  return policy;
}

std::vector<AnyPolicy> Policies(int block_size, int q_heads) {
  std::vector<AnyPolicy> policies = {
      WithThresholds(block_size, q_heads),
      XAttention(block_size, 0.5f, 8, 0.1f),
      WithForced(XAttention(block_size, 0.7f, 4, 0.05f), 0, 0, 0),
      WithForced(XAttention(block_size, 0.8f, 16, 0.02f), 2, 3, 1),
  };
  if (block_size % 128 == 0) policies.push_back(XAttention(block_size, 0.6f, 128, 0.02f));
  return policies;
}

const RegisterSuite suite({.method = "xattention", .policies = Policies});

// ---------------------------------------------------------------- by hand
// Blocks of 16 and cells of 4: four cells per block. 16 rows behind a prefix of 64: four rows of cells, which stand at
// cells 16 to 19, and see blocks 0 to 3 whole and one to four cells of block 4, their diagonal.

struct FiveBlocks {
  OpData data;
  explicit FiveBlocks(const std::vector<double>& weights, int group = 1) : data(OneDimension({16, 80}, group)) {
    SetWeights(data, 16, weights);
  }
};

TEST(XAttentionByHand, SoftmaxOverCellsSummedByBlock) {
  FiveBlocks blocks({1, 4, 2, 1, 1});
  // Row i (0 .. 3) sees 4 (1 + 4 + 2 + 1) + i + 1 = 33 + i in weights. With H = 1/33 + 1/34 + 1/35 + 1/36 = 0.116064
  // block b has the mass 4 w_b H, and block 4: 1/33 + 2/34 + 3/35 + 4/36 = 0.285952. All of it is 4, one per row.
  const double h = 1.0 / 33 + 1.0 / 34 + 1.0 / 35 + 1.0 / 36;
  ExpectNear({4 * h, 16 * h, 8 * h, 4 * h, 1.0 / 33 + 2.0 / 34 + 3.0 / 35 + 4.0 / 36},
             ChoiceOf(blocks.data, XAttention(16, 0.5f, 4), 0).energy);
}

TEST(XAttentionByHand, ForcedBlocksCountFirst) {
  FiveBlocks blocks({1, 4, 2, 1, 1});
  // Masses 0.464, 1.857, 0.929, 0.464, 0.286 of 4. Sink and diagonal, 0 and 4, hold 0.750, which is 0.1875 of all.
  ExpectKept(blocks.data, XAttention(16, 0.0f, 4), 0, {0, 4});
  ExpectKept(blocks.data, XAttention(16, 0.18f, 4), 0, {0, 4});
  ExpectKept(blocks.data, XAttention(16, 0.19f, 4), 0, {0, 1, 4}); // the block that reaches it is kept: 2.607
  // 0.5: 2 are needed, and 0, 4 and 1 hold 2.607. Counted after the others, block 2 would be kept too.
  ExpectKept(blocks.data, XAttention(16, 0.5f, 4), 0, {0, 1, 4});
  ExpectKept(blocks.data, XAttention(16, 0.66f, 4), 0, {0, 1, 2, 4}); // 2.64
  ExpectKept(blocks.data, XAttention(16, 0.89f, 4), 0, {0, 1, 2, 3, 4});
  // Without a sink only the diagonal is forced: 0.286 + 1.857 = 2.143 is enough for 0.5, not for 0.55 (2.2).
  ExpectKept(blocks.data, WithForced(XAttention(16, 0.5f, 4), 0, 0, 0), 0, {1, 4});
  ExpectKept(blocks.data, WithForced(XAttention(16, 0.55f, 4), 0, 0, 0), 0, {1, 2, 4});
}

TEST(XAttentionByHand, OfEqualBlocksTheFirstIsKept) {
  FiveBlocks blocks({1, 2, 2, 2, 1});
  // All rows see 4 * 7 + i + 1; blocks 1 to 3 have 8 H = 0.97 each with H = 0.1214: sink and diagonal and one of them,
  // 0.49 + 0.31 + 0.97 = 1.77, two of them 2.74.
  ExpectKept(blocks.data, XAttention(16, 0.4f, 4), 0, {0, 1, 4});
  ExpectKept(blocks.data, XAttention(16, 0.6f, 4), 0, {0, 1, 2, 4});
}

TEST(XAttentionByHand, AQueryMeetsTheKeyAcrossTheAntiDiagonal) {
  FiveBlocks blocks({1, 1, 1, 1, 1});
  const Sequence s = blocks.data.sequence(0);
  // The first query of each cell is 1, the others 0: they meet the last key of a cell. 4 ln 9 there, over a stride of
  // 4, is a weight of 9; the same at the first key of the cell meets a query of 0.
  for (int64_t i = 0; i < 16; ++i) blocks.data.SetQuery(s, i, 0, 0, i % 4 == 0);
  for (int64_t cell = 0; cell < 4; ++cell) {
    const float ln9 = 4 * std::log(9.0f);
    blocks.data.SetKey(blocks.data.problem().k, s, 16 + cell * 4 + 3, 0, 0, ln9);
    blocks.data.SetKey(blocks.data.problem().k, s, 32 + cell * 4, 0, 0, ln9);
  }
  const TileChoice choice = ChoiceOf(blocks.data, XAttention(16, 0.5f, 4), 0);
  ExpectNear({1, 9, 1, 1}, {choice.energy[0] / choice.energy[2], choice.energy[1] / choice.energy[2], 1,
                            choice.energy[3] / choice.energy[2]});
  // In 4 (1 + 9 + 1 + 1) + i + 1 the sink and the diagonal hold 0.13, block 1 the rest of two thirds.
  ExpectKept(blocks.data, XAttention(16, 0.7f, 4), 0, {0, 1, 4});
  // norm 2 halves scores: weights of 3.
  const TileChoice halved = ChoiceOf(blocks.data, XAttention(16, 0.5f, 4, 2), 0);
  EXPECT_NEAR(halved.energy[1] / halved.energy[2], 3, 1e-5);
}

TEST(XAttentionByHand, AShortCellIsPaddedWithZeros) {
  OpData data(OneDimension({2, 66}));
  SetWeights(data, 16, {1, 1, 1, 1, 1});
  const Sequence s = data.sequence(0);
  // Two queries of four: they meet keys 3 and 2 of a cell. Keys 0 and 1 of block 1's cells are met by no query; key 2
  // of block 2's cells is 4 ln 3, a weight of 3. The row stands at 65, in cell 16, half of which is past the end.
  for (int64_t cell = 0; cell < 4; ++cell) {
    data.SetKey(data.problem().k, s, 16 + cell * 4, 0, 0, 50);
    data.SetKey(data.problem().k, s, 17 + cell * 4, 0, 0, 50);
    data.SetKey(data.problem().k, s, 34 + cell * 4, 0, 0, 4 * std::log(3.0f));
  }
  // 4 + 4 + 12 + 4 + 1 = 25 in weights.
  ExpectNear({4.0 / 25, 4.0 / 25, 12.0 / 25, 4.0 / 25, 1.0 / 25}, ChoiceOf(data, XAttention(16, 0.5f, 4), 0).energy);
  ExpectKept(data, XAttention(16, 0.6f, 4), 0, {0, 2, 4});
}

TEST(XAttentionByHand, APrefixOffTheCellsLosesNoneOfItsOwnKeys) {
  OpData data(OneDimension({4, 66}));
  SetWeights(data, 16, {1, 1, 1, 1, 1});
  // P = 62: the rows lie at 62 .. 65, in blocks 3 and 4, and see cells 0 .. 16: four of each block, one of block 4.
  ExpectNear({4.0 / 17, 4.0 / 17, 4.0 / 17, 4.0 / 17, 1.0 / 17}, ChoiceOf(data, XAttention(16, 0.5f, 4), 0).energy);
  ExpectKept(data, XAttention(16, 0.0f, 4), 0, {0, 3, 4});
}

TEST(XAttentionByHand, WithoutCausalityEveryCellIsSeen) {
  OpCase op = OneDimension({8, 80});
  op.causal = false;
  OpData data(op);
  SetWeights(data, 16, {1, 4, 2, 1, 2});
  // Two rows, and each sees four cells of each block: masses 2/10, 8/10, 4/10, 2/10, 4/10 of 2. No block is forced but
  // the sink, which holds 0.1 of all; the block after it has 0.4, the third 0.2, as has the fifth.
  ExpectNear({0.2, 0.8, 0.4, 0.2, 0.4}, ChoiceOf(data, XAttention(16, 0.5f, 4), 0).energy);
  ExpectKept(data, XAttention(16, 0.0f, 4), 0, {0});
  ExpectKept(data, XAttention(16, 0.45f, 4), 0, {0, 1});
  ExpectKept(data, XAttention(16, 0.65f, 4), 0, {0, 1, 2});
  ExpectKept(data, WithForced(XAttention(16, 0.35f, 4), 0, 0, 0), 0, {1});
  ExpectKept(data, WithForced(XAttention(16, 0.75f, 4), 0, 0, 0), 0, {1, 2, 4});
}

TEST(XAttentionByHand, AThresholdForEachHead) {
  FiveBlocks blocks({1, 4, 2, 1, 1}, 3);
  const float thresholds[3] = {0, 0.5f, 1};
  AnyPolicy policy = XAttention(16, 0.9f, 4);
  policy.As<fp_xattention>().head_thresholds = thresholds;
  policy.As<fp_xattention>().head_count = 3;
  const int64_t rows = 1; // tiles of the mask per head: 16 / 128 + 1
  ExpectKept(blocks.data, policy, 0, {0, 4});
  ExpectKept(blocks.data, policy, rows, {0, 1, 4});
  ExpectKept(blocks.data, policy, 2 * rows, {0, 1, 2, 3, 4});
}

} // namespace
} // namespace flashprefill::test
