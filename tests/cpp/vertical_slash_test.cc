// FlexPrefill and MInference, worked out by hand. See by_hand.h for what inputs are.
#include "by_hand.h"

namespace flashprefill::test {
namespace {

// ---------------------------------------------------------------- FlexPrefill
//
// Five blocks of 128 keys that weigh 1, 2, 4, 1 and next to nothing, and query rows that end with them. Each of the
// last 128 rows sees blocks 0..3 whole, so its softmax has the shares 1/8, 2/8, 4/8, 1/8, equal within a block.
//
// Columns, gamma .6: the 128 keys of block 2 sum to .5, and each of block 1 adds .25 / 128, of which 51 fit into .1.
// That is 179 tokens, and 1: 180 / 128 + 1 = 2 blocks. The first column and the best other one, 2.
//
// Diagonals: in units of 1/1024 the sum at distance 512, 384, 256, 128, 0 is 1, 2, 4, 1, 0, and linear between. The
// largest that sum to .6 are those above 2.12, some 200: again 2 blocks. Summed to distances of blocks, with a =
// 129/256 of a key block's pairs at the nearer one:
//     0: 1/8 (1 - a) = .062   1: 4/8 (1 - a) + 1/8 a = .311   2: 2/8 (1 - a) + 4/8 a = .376
//     3: 1/8 (1 - a) + 2/8 a = .188   4: 1/8 a = .063
// so distances 0 and 2.
OpData FlexKeys(Lengths lengths) {
  OpData data(OneDimension(lengths));
  SetWeights(data, 128, {1, 2, 4, 1, 1e-6});
  return data;
}

void ExpectTiles(const OpData& data, const AnyPolicy& policy, const std::vector<Blocks>& tiles) {
  for (size_t m = 0; m < tiles.size(); ++m) ExpectKept(data, policy, static_cast<int64_t>(m), tiles[m]);
}

TEST(FlexPrefillByHand, ColumnsAndDiagonals) {
  const OpData data = FlexKeys({640, 640});
  ExpectTiles(data, FlexPrefill(128, 0.6f, 0, 128), {{0}, {0, 1}, {0, 2}, {0, 1, 2, 3}, {0, 2, 4}});
}

TEST(FlexPrefillByHand, BudgetsAreTokensInBlocks) {
  const OpData data = FlexKeys({640, 640});
  // At most one block: the forced column and diagonal.
  ExpectTiles(data, FlexPrefill(128, 0.6f, 0, 128, 128), {{0}, {0, 1}, {0, 2}, {0, 3}, {0, 4}});
  // At most 129 tokens are two blocks.
  ExpectTiles(data, FlexPrefill(128, 0.99f, 0, 1, 129), {{0}, {0, 1}, {0, 2}, {0, 1, 2, 3}, {0, 2, 4}});
  // At least 257 tokens are three: column 1 and distance 1 join.
  ExpectTiles(data, FlexPrefill(128, 0.1f, 0, 257), {{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}});
}

TEST(FlexPrefillByHand, BothBlockDiagonalsOfALine) {
  const OpData data = FlexKeys({640, 640});
  AnyPolicy both = FlexPrefill(128, 0.6f, 0, 128);
  both.flex.cover = FP_COVER_BOTH;
  // Distances 0 and 2 are blocks 0, 1, 2, 3 away.
  ExpectTiles(data, both, {{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}});
  // With at most one, distances 0 and 1 of blocks.
  both.flex.max_budget = 128;
  ExpectTiles(data, both, {{0}, {0, 1}, {0, 1, 2}, {0, 2, 3}, {0, 3, 4}});
}

// The mean keys foretell the columns exactly, so their distance is 0, and tau above it makes the head query-aware. One
// block of columns and diagonals each: the first. The map's rows are the weights 1, 2, 4, 1, 0 up to the diagonal:
//     1 | 1/3 2/3 | 1/7 2/7 4/7 | 1/8 2/8 4/8 1/8 | 1/8 2/8 4/8 1/8 0
// Largest first: 1, .667, .571, .5 (row 3), .5 (row 4, less by a millionth), ..: they sum to 1, 1.667, 2.238, 2.738,
// 3.238. gamma .6 of five rows is 3: the fifth would pass it and is dropped. Of 3.25 it is kept.
TEST(FlexPrefillByHand, QueryAware) {
  const OpData data = FlexKeys({640, 640});
  ExpectTiles(data, FlexPrefill(128, 0.6f, 0.01f, 128), {{0}, {0, 1}, {0, 2}, {0, 2, 3}, {0, 4}});
  ExpectTiles(data, FlexPrefill(128, 0.65f, 0.01f, 128), {{0}, {0, 1}, {0, 2}, {0, 2, 3}, {0, 2, 4}});
  // Half of block 1's keys weigh 4 - 1e-6, half 1e-6: the same sums, but another mean, ln(.002). The foretold columns
  // are 1, .002, 4, 1 of 6: against 1, 2, 4, 1 of 8 the distance is .33.
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
  // The map without block 1: 1 | 1 .002 | .2 0 .8 | 1/6 0 4/6 1/6 | 1/6 0 4/6 1/6 0. Largest first: 1, 1, .8, ..: 2.8,
  // and .667 passes 3. Rows 3 and 4 keep their first column and their diagonal only.
  EXPECT_EQ(kept(0.4f), (std::vector<Blocks>{{0}, {0, 1}, {0, 2}, {0, 3}, {0, 4}}));
  EXPECT_NE(kept(0.2f), kept(0.4f));
}

TEST(FlexPrefillByHand, ChunksAfterAPrefix) {
  // The last rows are the same, so are columns and diagonals. Tile 0 alone holds what tile 4 did.
  ExpectTiles(FlexKeys({128, 640}), FlexPrefill(128, 0.6f, 0, 128), {{0, 2, 4}});
  // 200 rows begin at position 440. Tile 0 lies in blocks 3 and 4: distances 0 and 2 are 3, 4 and 1, 2 there. Tile 1
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

// ---------------------------------------------------------------- MInference

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
  // 31 columns: the first 30 and 200, in blocks 0 and 3 of 64. 50 distances, the nearest: a tile's keys begin 49 before
  // it, in the block before its own two.
  ExpectTiles(data, MInference(64, 31, 50), {{0, 1}, {0, 1, 2, 3}, {0, 3, 4, 5}, {0, 3, 5, 6, 7}});
  // 101 distances: the nearest 100 and the best other. Row p sees key 200 at distance p - 200 with the share
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
  // Two blocks of queries a tile, two blocks of keys each: 0 and 0, 1; then 1, 2 twice; from row 4 on, 1 and 4.
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

TEST(MInferenceByHand, LinesOfTokens) {
  OpData data = OneHeavyKey();
  const Sequence s = data.sequence(0);
  for (int64_t t = 0; t < 512; ++t) data.SetKey(data.problem().v, s, t, 0, 0, t == 200 ? 100 : t < 30 ? 1 : 0);
  // 31 columns, 0 to 29 and 200, and distances 0 to 49. The mask's blocks are the diagonal's alone: tile 3, rows 384 to
  // 511, has blocks 6 and 7, and lines add keys 335 to 383, the columns, and nothing else: 49 + 31 keys are a block and
  // a part of one, rounded up to 2.
  const AnyPolicy policy = InTokens(MInference(64, 31, 50));
  for (const Engine& engine : AllEngines()) {
    const Mask mask = Select(engine, data.problem(), policy);
    EXPECT_EQ(mask.view.max_verticals, 31);
    EXPECT_EQ(mask.view.max_slashes, 50);
    std::vector<int32_t> lines = {31, 50};
    for (int t = 0; t < 30; ++t) lines.push_back(t);
    lines.push_back(200);
    for (int d = 0; d < 50; ++d) lines.push_back(d);
    EXPECT_EQ(mask.vertical_slash, lines) << engine.Name();
    EXPECT_EQ(Kept(mask, 3), (Blocks{6, 7})) << engine.Name();
    EXPECT_EQ(mask.counts[3], 4) << engine.Name();
    // Row 400 attends to 335..400, 0..29 with value 1 and 200 with value 100 and weight e^8.
    const Attended a = Attend(engine, data.problem(), mask);
    const double weights = 66 + 30 + std::exp(8);
    EXPECT_NEAR(a.out[400], (30 + 100 * std::exp(8)) / weights, 1e-3) << engine.Name();
    EXPECT_NEAR(a.lse[400], std::log(weights), 1e-5) << engine.Name();
    // Row 10 sees no further than itself, whatever column there is.
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
