// FlexPrefill: the policies that are compared with the reference, and arithmetic done by hand. See by_hand.h for what
// inputs are.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "by_hand.h"
#include "method_suite.h"

namespace flashprefill::test {
namespace {

AnyPolicy FlexPrefill(int block_size, float gamma, float tau, int min_budget = 16, int max_budget = 0) {
  AnyPolicy policy = Parse("flexprefill", block_size);
  auto& fields = policy.As<fp_flexprefill>();
  fields.gamma = gamma;
  fields.tau = tau;
  fields.min_budget = min_budget;
  fields.max_budget = max_budget;
  return policy;
}

std::vector<AnyPolicy> Policies(int block_size, int) {
  block_size = std::min(block_size, 128); // the cases have hardly two of larger blocks
  AnyPolicy both = FlexPrefill(block_size, 0.5f, 0, 1);
  both.As<fp_flexprefill>().cover = FP_COVER_BOTH;
  return {
      FlexPrefill(block_size, 0.4f, 0, 1),
      FlexPrefill(block_size, 0.6f, 1, 1), // 1 is above every distance: all heads are query-aware
      WithForced(FlexPrefill(block_size, 0.7f, 0.3f, block_size), 1, 2, 1),
      both,
      FlexPrefill(block_size, 0.95f, 0.5f, 16, 3 * block_size),
      FlexPrefill(block_size, 0.3f, 1, 2 * block_size),
  };
}

const RegisterSuite suite({.method = "flexprefill", .policies = Policies});

// ---------------------------------------------------------------- by hand

// Five blocks of 128 keys that weigh 1, 2, 4, 1 and next to nothing, and query rows that end with them. Each of the
// last 128 rows sees blocks 0..3 whole, so its softmax has the shares 1/8, 2/8, 4/8, 1/8, equal within a block.
//
// Verticals, gamma 0.6: the 128 keys of block 2 sum to 0.5, and each of block 1 adds 0.25 / 128, of which 51 fit into
// 0.1. That is 179 tokens, and 1: 180 / 128 + 1 = 2 blocks. The first block and the best other one, 2.
//
// Slashes: in units of 1/1024 the sum at distance 512, 384, 256, 128, 0 is 1, 2, 4, 1, 0, and linear between. The
// largest that sum to 0.6 are those above 2.12, some 200: again 2 blocks. Summed to slashes of blocks, with a =
// 129/256 of a key block's pairs at the nearer one:
//     0: 1/8 (1 - a) = 0.062   1: 4/8 (1 - a) + 1/8 a = 0.311   2: 2/8 (1 - a) + 4/8 a = 0.376
//     3: 1/8 (1 - a) + 2/8 a = 0.188   4: 1/8 a = 0.063
// so slashes 0 and 2.
OpData FlexKeys(Lengths lengths) {
  OpData data(OneDimension(lengths));
  SetWeights(data, 128, {1, 2, 4, 1, 1e-6});
  return data;
}

TEST(FlexPrefillByHand, VerticalsAndSlashes) {
  const OpData data = FlexKeys({640, 640});
  ExpectTiles(data, FlexPrefill(128, 0.6f, 0, 128), {{0}, {0, 1}, {0, 2}, {0, 1, 2, 3}, {0, 2, 4}});
}

TEST(FlexPrefillByHand, BudgetsAreTokensInBlocks) {
  const OpData data = FlexKeys({640, 640});
  // At most one block: the forced vertical and slash.
  ExpectTiles(data, FlexPrefill(128, 0.6f, 0, 128, 128), {{0}, {0, 1}, {0, 2}, {0, 3}, {0, 4}});
  // At most 129 tokens are two blocks.
  ExpectTiles(data, FlexPrefill(128, 0.99f, 0, 1, 129), {{0}, {0, 1}, {0, 2}, {0, 1, 2, 3}, {0, 2, 4}});
  // At least 257 tokens are three: vertical 1 and slash 1 join.
  ExpectTiles(data, FlexPrefill(128, 0.1f, 0, 257), {{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}});
}

TEST(FlexPrefillByHand, BothBlockDiagonalsOfASlash) {
  const OpData data = FlexKeys({640, 640});
  AnyPolicy both = FlexPrefill(128, 0.6f, 0, 128);
  both.As<fp_flexprefill>().cover = FP_COVER_BOTH;
  // Slashes 0 and 2 are blocks 0, 1, 2, 3 away.
  ExpectTiles(data, both, {{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}});
  // With at most one, slashes 0 and 1 of blocks.
  both.As<fp_flexprefill>().max_budget = 128;
  ExpectTiles(data, both, {{0}, {0, 1}, {0, 1, 2}, {0, 2, 3}, {0, 3, 4}});
}

// The mean keys predict the verticals exactly, so their distance is 0, and tau above it makes the head query-aware. One
// block of verticals and of slashes: the first. The map's rows are the weights 1, 2, 4, 1, 0 up to the diagonal:
//     1 | 1/3 2/3 | 1/7 2/7 4/7 | 1/8 2/8 4/8 1/8 | 1/8 2/8 4/8 1/8 0
// Largest first: 1, 0.667, 0.571, 0.5 (row 3), 0.5 (row 4, less by a millionth), ..: they sum to
// 1, 1.667, 2.238, 2.738, 3.238. gamma 0.6 of five rows is 3: the fifth would pass it and is dropped. Of 3.25 it is
// kept.
TEST(FlexPrefillByHand, QueryAware) {
  const OpData data = FlexKeys({640, 640});
  ExpectTiles(data, FlexPrefill(128, 0.6f, 0.01f, 128), {{0}, {0, 1}, {0, 2}, {0, 2, 3}, {0, 4}});
  ExpectTiles(data, FlexPrefill(128, 0.65f, 0.01f, 128), {{0}, {0, 1}, {0, 2}, {0, 2, 3}, {0, 2, 4}});
  // Half of block 1's keys weigh 4 - 1e-6, half 1e-6: the same sums, but another mean, ln(0.002). The predicted
  // verticals are 1, 0.002, 4, 1 of 6: against 1, 2, 4, 1 of 8 the distance is 0.33.
  OpData uneven = FlexKeys({640, 640});
  const Sequence s = uneven.sequence(0);
  for (int64_t t = 128; t < 256; ++t) {
    uneven.SetKey(uneven.problem().k, s, t, 0, 0, static_cast<float>(std::log(t % 2 ? 4 - 1e-6 : 1e-6)));
  }
  const std::vector<Blocks> aware = {{0}, {0, 1}, {0, 2}, {0, 2, 3}, {0, 2, 4}};
  const auto kept = [&](float tau) {
    std::vector<Blocks> tiles;
    const Mask mask = Select(Reference(), uneven.problem(), FlexPrefill(128, 0.6f, tau, 128));
    for (int64_t m = 0; m < 5; ++m) tiles.push_back(Kept(mask, m));
    return tiles;
  };
  // The map without block 1: 1 | 1 0.002 | 0.2 0 0.8 | 1/6 0 4/6 1/6 | 1/6 0 4/6 1/6 0. Largest first: 1, 1, 0.8,
  // ..: 2.8, and 0.667 passes 3. Rows 3 and 4 keep their first block and their diagonal only.
  EXPECT_EQ(kept(0.4f), (std::vector<Blocks>{{0}, {0, 1}, {0, 2}, {0, 3}, {0, 4}}));
  EXPECT_NE(kept(0.2f), kept(0.4f));
}

TEST(FlexPrefillByHand, ChunksAfterAPrefix) {
  // The last rows are the same, so are verticals and slashes. Tile 0 alone holds what tile 4 did.
  ExpectTiles(FlexKeys({128, 640}), FlexPrefill(128, 0.6f, 0, 128), {{0, 2, 4}});
  // 200 rows begin at position 440. Tile 0 lies in blocks 3 and 4: slashes 0 and 2 are 3, 4 and 1, 2 there. Tile 1
  // begins at 568, in block 4.
  ExpectTiles(FlexKeys({200, 640}), FlexPrefill(128, 0.6f, 0, 128), {{0, 1, 2, 3, 4}, {0, 2, 4}});
}

TEST(FlexPrefillByHand, ShortSequencesKeepEverything) {
  const auto fallback = [](Lengths lengths, int min_budget) {
    const OpData data = FlexKeys(lengths);
    const Mask mask = Select(AllEngines().front(), data.problem(), FlexPrefill(128, 0.6f, 0, min_budget));
    return mask.fallback[0];
  };
  EXPECT_EQ(fallback({256, 256}, 1), FP_FALLBACK_SHORT); // two blocks
  EXPECT_EQ(fallback({257, 257}, 1), FP_SELECTED);
  EXPECT_EQ(fallback({512, 512}, 400), FP_FALLBACK_SHORT); // four blocks of budget
  EXPECT_EQ(fallback({513, 513}, 400), FP_SELECTED);
  EXPECT_EQ(fallback({1, 640}, 1), FP_FALLBACK_SHORT); // decoding
}

} // namespace
} // namespace flashprefill::test
