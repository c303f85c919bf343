// RRAttention: the policies that are compared with the reference, and arithmetic done by hand.
#include <gtest/gtest.h>

#include <cmath>

#include "by_hand.h"
#include "method_suite.h"

namespace flashprefill::test {
namespace {

AnyPolicy RRAttention(int block_size, float threshold, int stride = 8) {
  AnyPolicy policy = Parse("rrattention", block_size);
  policy.As<fp_rrattention>().threshold = threshold;
  policy.As<fp_rrattention>().stride = stride;
  return policy;
}

std::vector<AnyPolicy> Policies(int block_size, int) {
  std::vector<AnyPolicy> policies = {
      RRAttention(block_size, 0.95f),
      WithForced(RRAttention(block_size, 0.5f, 4), 0, 0, 0),
      WithForced(RRAttention(block_size, 0.7f, 16), 1, 2, 1),
  };
  if (block_size % 128 == 0) policies.push_back(RRAttention(block_size, 0.6f, 64));
  return policies;
}

const RegisterSuite suite({.method = "rrattention", .policies = Policies});

// ---------------------------------------------------------------- by hand
// Blocks of 16 and cells of 4: four cells per block. 16 rows behind a prefix of 64: four rows of cells, which stand at
// cells 16 to 19, and see blocks 0 to 3 whole and one to four cells of block 4, their diagonal.

struct FiveBlocks {
  OpData data;
  explicit FiveBlocks(const std::vector<double>& weights, int group = 1) : data(OneDimension({16, 80}, group)) {
    SetWeights(data, 16, weights);
  }
};

TEST(RRAttentionByHand, TheSmallestSetIsTakenBeforeForcedBlocksAreJoined) {
  FiveBlocks blocks({1, 4, 2, 1, 1});
  // With equal queries masses are XAttention's: 0.464, 1.857, 0.929, 0.464, 0.286 of 4. Half of all is blocks 1 and 2.
  const double h = 1.0 / 33 + 1.0 / 34 + 1.0 / 35 + 1.0 / 36;
  ExpectNear({4 * h, 16 * h, 8 * h, 4 * h, 1.0 / 33 + 2.0 / 34 + 3.0 / 35 + 4.0 / 36},
             ChoiceOf(blocks.data, RRAttention(16, 0.5f, 4), 0).energy);
  ExpectKept(blocks.data, RRAttention(16, 0.46f, 4), 0, {0, 1, 4});
  ExpectKept(blocks.data, RRAttention(16, 0.5f, 4), 0, {0, 1, 2, 4});
  ExpectKept(blocks.data, WithForced(RRAttention(16, 0.5f, 4), 0, 0, 0), 0, {1, 2, 4});
}

TEST(RRAttentionByHand, EachHeadAsksAnotherQueryOfItsCell) {
  FiveBlocks blocks({1, 1, 1, 1, 1}, 5);
  const Sequence s = blocks.data.sequence(0);
  for (int64_t i = 0; i < 16; ++i) {
    for (int h = 0; h < 5; ++h) blocks.data.SetQuery(s, i, h, 0, static_cast<float>(i % 4));
  }
  // One key of each cell of block 1 is 4 ln 2: the cell's mean is ln 2, and its weight 2 to the power of the query.
  // Head 0 asks the last query of a cell, 3; head 1 the one before it; head 4 is head 0 again.
  for (int64_t cell = 0; cell < 4; ++cell) {
    blocks.data.SetKey(blocks.data.problem().k, s, 16 + cell * 4 + cell, 0, 0, 4 * std::log(2.0f));
  }
  const double weights[5] = {8, 4, 2, 1, 8};
  for (int h = 0; h < 5; ++h) {
    const TileChoice choice = ChoiceOf(blocks.data, RRAttention(16, 0.5f, 4), 0, h);
    EXPECT_NEAR(choice.energy[1] / choice.energy[2], weights[h], 1e-5) << "head " << h;
  }
}

TEST(RRAttentionByHand, AShortCellGivesItsLastQuery) {
  OpData data(OneDimension({2, 66}));
  SetWeights(data, 16, {1, 2, 1, 1, 1});
  const Sequence s = data.sequence(0);
  data.SetQuery(s, 1, 0, 0, 3); // row 1, the last one; the head's place is the fourth
  // Weights 1, 8, 1, 1 for four cells each, and one cell of block 4: 45.
  ExpectNear({4.0 / 45, 32.0 / 45, 4.0 / 45, 4.0 / 45, 1.0 / 45}, ChoiceOf(data, RRAttention(16, 0.5f, 4), 0).energy);
}

} // namespace
} // namespace flashprefill::test
