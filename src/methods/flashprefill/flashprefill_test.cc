// FlashPrefill: the policies that are compared with the reference, and arithmetic done by hand. Inputs by hand have one
// dimension, softmax_scale 1 and queries of 1, so that a key of ln(w) has the energy w: energies in the comments are
// counts of rows times such weights.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "by_hand.h"
#include "method_suite.h"

namespace flashprefill::test {
namespace {

// Without forced blocks beyond the diagonal, so that the score decides.
AnyPolicy FlashPrefill(int block_size, float alpha, int query_pool = 1, int min_blocks = 0) {
  AnyPolicy policy = Parse("flashprefill", block_size);
  auto& fields = policy.As<fp_flashprefill>();
  fields.alpha = alpha;
  fields.query_pool = query_pool;
  fields.min_blocks = min_blocks;
  return WithForced(policy, 0, 0, 0);
}

std::vector<AnyPolicy> Policies(int block_size, int) {
  std::vector<AnyPolicy> policies = {
      FlashPrefill(block_size, 0.5f),
      FlashPrefill(block_size, 0.6f, 16),
      FlashPrefill(block_size, 0.7f, 128),
      FlashPrefill(block_size, 0.9f, 7),
      WithForced(FlashPrefill(block_size, 0.8f, 4, 3), 1, 2, 1),
  };
  const size_t own = policies.size();
  for (size_t i = 0; i < own; ++i) policies.push_back(Shared(policies[i]));
  return policies;
}

const RegisterSuite suite({.method = "flashprefill", .policies = Policies, .many = 3, .few = 3});

TEST(FlashPrefillByHand, AHeadOfItsOwnSeesBlocksByTheirLastToken) {
  OpData data(OneDimension({256, 256}));
  SetWeights(data, 64, {0.5, 1, 4, 1});
  // Tile 1 holds rows 128..255. Blocks 0 and 1 end at 63 and 127: all 128 rows see them. Block 2 ends at 191: rows
  // 191..255, 65 of them. Block 3 ends at 255: one row. Energies 64, 128, 260, 1.
  const TileChoice choice = ChoiceOf(data, FlashPrefill(64, 0.25f), 1);
  ExpectNear({64.0 / 128, 1, 260.0 / 128, 1.0 / 128}, Relative(choice, 1));
  // alpha 0.25: the threshold is 65, so block 0 is out; alpha 0.24: 62.4, so it is in. 2 and 3 are the tile's diagonal.
  ExpectKept(data, FlashPrefill(64, 0.25f), 1, {1, 2, 3});
  ExpectKept(data, FlashPrefill(64, 0.24f), 1, {0, 1, 2, 3});
}

TEST(FlashPrefillByHand, SharedHeadsSeeBlocksByTheirFirstToken) {
  OpData data(OneDimension({256, 256}, 2));
  SetWeights(data, 64, {0.9, 0.7, 1, 4});
  // Two heads: tiles of 64 tokens, 128 rows. Tile 3 holds tokens 192..255, and block 3, which begins at 192, is
  // complete at 255: all rows see all blocks. Energies 115.2, 89.6, 128, 512, threshold 0.2 * 512 = 102.4. Were block 3
  // seen by its last token, it would have 2 rows, and block 1 would stay.
  const AnyPolicy policy = Shared(FlashPrefill(64, 0.2f));
  ExpectNear({0.9, 0.7, 1, 4}, Relative(ChoiceOf(data, policy, 3), 2));
  ExpectKept(data, policy, 3, {0, 2, 3});
}

TEST(FlashPrefillByHand, SharedHeadsDoNotScoreWhatTheTileLeavesIncomplete) {
  OpData data(OneDimension({64, 160}, 2));
  SetWeights(data, 64, {1, 1, 1000});
  // P = 96: the tile's positions are 96..159. Block 2 begins at 128 and is not complete at 159, so it is not scored,
  // heavy as it is; the diagonal begins with block 1.
  const AnyPolicy policy = Shared(FlashPrefill(64, 0.5f));
  const TileChoice choice = ChoiceOf(data, policy, 0);
  EXPECT_EQ(choice.scored, (std::vector<uint8_t>{1, 1, 0}));
  ExpectNear({1, 1, 0}, Relative(choice, 0));
  ExpectKept(data, policy, 0, {0, 1, 2});
}

TEST(FlashPrefillByHand, PooledRowsStandAtTheirLastToken) {
  OpData data(OneDimension({256, 256}));
  SetWeights(data, 64, {1, 1, 1, 1});
  const Sequence s = data.sequence(0);
  for (int64_t i = 0; i < s.q_len; i += 2) {
    data.SetQuery(s, i, 0, 0, 0); // means of 0 and 2
    data.SetQuery(s, i + 1, 0, 0, 2);
  }
  // Tile 1 is 64 rows at 129, 131, .. 255. Block 2 ends at 191: rows 191, 193, .. 255, 33 of them. Block 3: one.
  ExpectNear({1, 1, 33.0 / 64, 1.0 / 64}, Relative(ChoiceOf(data, FlashPrefill(64, 0.5f, 2), 1), 0));
}

TEST(FlashPrefillByHand, AShortRestOfRowsIsItsOwnMean) {
  OpData data(OneDimension({131, 131}));
  SetWeights(data, 64, {1, 1, 1});
  const Sequence s = data.sequence(0);
  const double ln2 = std::log(2.0);
  data.SetQuery(s, 128, 0, 0, 1);
  data.SetQuery(s, 129, 0, 0, 3);
  data.SetQuery(s, 130, 0, 0, 5);
  for (int64_t t = 0; t < 64; ++t) data.SetKey(data.problem().k, s, t, 0, 0, static_cast<float>(ln2));
  // Tile 1 holds rows 128..130, pooled by 2: means 2 and 5. Block 0: 2^2 + 2^5 = 36; block 1 (keys 0): 2.
  const TileChoice choice = ChoiceOf(data, FlashPrefill(64, 0.5f, 2), 1);
  EXPECT_NEAR(choice.energy[0] / choice.energy[1], 18, 1e-5);
  EXPECT_EQ(choice.scored, (std::vector<uint8_t>{1, 1, 0})); // block 2 is not complete at 130
}

TEST(FlashPrefillByHand, MeansAreRoundedToTheirDtype) {
  OpCase op = OneDimension({128, 128});
  op.AllDtypes(FP_BF16);
  OpData data(op);
  const Sequence s = data.sequence(0);
  // 1 and 1 + 2^-7 are neighbours in bf16; their mean lies between them and rounds to the even one, 1.
  for (int64_t t = 0; t < 128; ++t) data.SetKey(data.problem().k, s, t, 0, 0, t % 2 ? 1.0f : 1.0f + 0x1p-7f);
  const auto means = reference::BlockMeans(Geometry::Of(data.problem(), 64, false), s,
                                           reference::LoadKeys(data.problem(), s, 0), FP_BF16);
  EXPECT_EQ(means.data, (std::vector<double>{1, 1}));
}

TEST(FlashPrefillByHand, WhatIsNotFiniteDoesNotPoisonTheTile) {
  OpData data(OneDimension({128, 384}));
  SetWeights(data, 64, {1, 2, 4, 1, 1, 1});
  const Sequence s = data.sequence(0);
  data.SetKey(data.problem().k, s, 130, 0, 0, NAN); // block 2's mean
  data.SetQuery(s, 7, 0, 0,
                std::numeric_limits<float>::infinity()); // one row of 128; inf * ln 1 is NaN, inf * ln 2 inf
  const TileChoice choice = ChoiceOf(data, FlashPrefill(64, 0.6f), 0);
  EXPECT_EQ(choice.energy[2], 0);
  ExpectNear({0.5, 1}, {choice.energy[0] / choice.energy[1], 1});
  ExpectKept(data, FlashPrefill(64, 0.6f), 0, {1, 4, 5});
}

TEST(FlashPrefillByHand, MinBlocksAreTheTopOnes) {
  OpData data(OneDimension({384, 384}));
  SetWeights(data, 64, {1, 4, 2, 1, 1e-9, 1e-9});
  // Tile 2 (rows 256..383) sees blocks 0..3 with all rows; 4 and 5 are its diagonal and weigh nothing.
  ExpectKept(data, FlashPrefill(64, 0.9f, 1, 2), 2, {1, 2, 4, 5});
  ExpectKept(data, FlashPrefill(64, 0.9f, 1, 1), 2, {1, 4, 5});
}

TEST(FlashPrefillByHand, ShortSequencesFallBack) {
  OpData data(OneDimension({512, 512}));
  for (const Engine& engine : AllEngines()) {
    // Blocks of 128: sink 2 and window 4 leave nothing of 4 blocks.
    const Mask small = Select(engine, data.problem(), AnyPolicy(FP_FLASHPREFILL));
    EXPECT_EQ(small.fallback[0], FP_FALLBACK_SHORT) << engine.Name();
    EXPECT_EQ(Kept(small, 3), (Blocks{0, 1, 2, 3})) << engine.Name();
    const std::vector<int32_t> counts(small.counts.begin(), small.counts.begin() + 4); // the fifth row is unused
    EXPECT_EQ(counts, (std::vector<int32_t>{1, 2, 3, 4})) << engine.Name();
    EXPECT_EQ(Select(engine, data.problem(), FlashPrefill(128, 0.5f)).fallback[0], FP_SELECTED) << engine.Name();
  }
}

} // namespace
} // namespace flashprefill::test
