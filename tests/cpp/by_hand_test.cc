// Arithmetic done by hand: energies of the reference, and masks and outputs of every backend. Inputs have one
// dimension, softmax_scale 1 and queries of 1, so that a key of ln(w) has the energy w: energies in the comments are
// counts of rows times such weights.
#include "by_hand.h"

#include <gtest/gtest.h>

#include <cmath>

namespace flashprefill::test {
namespace {

TEST(SelectByHand, AHeadOfItsOwnSeesBlocksByTheirLastToken) {
  OpData data(OneDimension({256, 256}));
  SetWeights(data, 64, {0.5, 1, 4, 1});
  // Tile 1 holds rows 128..255. Blocks 0 and 1 end at 63 and 127: all 128 rows see them. Block 2 ends at 191: rows
  // 191..255, 65 of them. Block 3 ends at 255: one row. Energies 64, 128, 260, 1.
  const TileChoice choice = ChoiceOf(data, FlashPrefill(64, 0.25f), 1);
  ExpectNear({64.0 / 128, 1, 260.0 / 128, 1.0 / 128}, Relative(choice, 1));
  // alpha .25: the threshold is 65, so block 0 is out; alpha .24: 62.4, so it is in. 2 and 3 are the tile's diagonal.
  ExpectKept(data, FlashPrefill(64, 0.25f), 1, {1, 2, 3});
  ExpectKept(data, FlashPrefill(64, 0.24f), 1, {0, 1, 2, 3});
}

TEST(SelectByHand, SharedHeadsSeeBlocksByTheirFirstToken) {
  OpData data(OneDimension({256, 256}, 2));
  SetWeights(data, 64, {0.9, 0.7, 1, 4});
  // Two heads: tiles of 64 tokens, 128 rows. Tile 3 holds tokens 192..255, and block 3, which begins at 192, is
  // complete at 255: all rows see all blocks. Energies 115.2, 89.6, 128, 512, threshold .2 * 512 = 102.4. Were block 3
  // seen by its last token, it would have 2 rows, and block 1 would stay.
  const AnyPolicy policy = Shared(FlashPrefill(64, 0.2f));
  ExpectNear({0.9, 0.7, 1, 4}, Relative(ChoiceOf(data, policy, 3), 2));
  ExpectKept(data, policy, 3, {0, 2, 3});
}

TEST(SelectByHand, SharedHeadsDoNotScoreWhatTheTileLeavesIncomplete) {
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

TEST(SelectByHand, PooledRowsStandAtTheirLastToken) {
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

TEST(SelectByHand, AShortRestOfRowsIsItsOwnMean) {
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

TEST(SelectByHand, MeansAreRoundedToTheirDtype) {
  OpCase op = OneDimension({128, 128});
  op.AllDtypes(FP_BF16);
  OpData data(op);
  const Sequence s = data.sequence(0);
  // 1 and 1 + 2^-7 are neighbours in bf16; their mean lies between them and rounds to the even one, 1.
  for (int64_t t = 0; t < 128; ++t) data.SetKey(data.problem().k, s, t, 0, 0, t % 2 ? 1.0f : 1.0f + 0x1p-7f);
  const auto means = reference::BlockMeans(Geometry::Of(data.problem(), 64, false), s,
                                           reference::LoadKeys(data.problem(), data.problem().k, s, 0), FP_BF16);
  EXPECT_EQ(means.data, (std::vector<double>{1, 1}));
}

TEST(SelectByHand, SinkWindowAndDiagonal) {
  OpData data(OneDimension({512, 512}));
  // Blocks of 64, tiles of 128: tile 3 begins at 384, so its diagonal is blocks 6 and 7, and tile 2's is 4 and 5. A
  // window of 2 reaches one block further back; windows of 0 and 1 are the diagonal alone.
  const auto expect = [&](int sink, int window, int tail, const std::vector<Blocks>& rows) {
    for (int64_t m = 0; m < 4; ++m) ExpectKept(data, Streaming(64, sink, window, tail), m, rows[m]);
  };
  expect(1, 2, 0, {{0, 1}, {0, 1, 2, 3}, {0, 3, 4, 5}, {0, 5, 6, 7}});
  expect(0, 0, 0, {{0, 1}, {2, 3}, {4, 5}, {6, 7}});
  expect(0, 1, 0, {{0, 1}, {2, 3}, {4, 5}, {6, 7}});
  expect(3, 0, 0, {{0, 1}, {0, 1, 2, 3}, {0, 1, 2, 4, 5}, {0, 1, 2, 6, 7}});
  // A tail of one block is half a tile, so one tile; of three blocks, two tiles.
  expect(0, 0, 1, {{0, 1}, {2, 3}, {4, 5}, {0, 1, 2, 3, 4, 5, 6, 7}});
  expect(0, 0, 3, {{0, 1}, {2, 3}, {0, 1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5, 6, 7}});
}

TEST(SelectByHand, ADiagonalOffTheGridIsTwoBlocks) {
  OpData data(OneDimension({128, 200}));
  // P = 72: positions 72..199. The first row's own block is 72 / 128 = 0, the last row's 1.
  ExpectKept(data, Streaming(128, 0, 1, 0), 0, {0, 1});
  // With blocks of 64: 72 / 64 = 1 to 199 / 64 = 3.
  ExpectKept(data, Streaming(64, 0, 1, 0), 0, {1, 2, 3});
}

TEST(SelectByHand, TheDenseTailIsForFinalChunks) {
  OpCase op = OneDimension({512, 512});
  op.final_chunk = false;
  OpData data(op);
  ExpectKept(data, Streaming(64, 0, 0, 2), 3, {6, 7});
}

TEST(SelectByHand, ShortSequencesAndDenseFallBack) {
  OpData data(OneDimension({512, 512}));
  for (const Engine& engine : AllEngines()) {
    // Blocks of 128: sink 2 and window 4 leave nothing of 4 blocks.
    const Mask small = Select(engine, data.problem(), AnyPolicy(FP_FLASHPREFILL));
    EXPECT_EQ(small.fallback[0], FP_FALLBACK_SHORT) << engine.Name();
    EXPECT_EQ(Kept(small, 3), (Blocks{0, 1, 2, 3})) << engine.Name();
    const std::vector<int32_t> counts(small.counts.begin(), small.counts.begin() + 4); // the fifth row is nobody's
    EXPECT_EQ(counts, (std::vector<int32_t>{1, 2, 3, 4})) << engine.Name();
    const Mask dense = Select(engine, data.problem(), Dense());
    EXPECT_EQ(dense.fallback[0], FP_FALLBACK_DENSE) << engine.Name();
    EXPECT_EQ(Kept(dense, 2), (Blocks{0, 1, 2})) << engine.Name();
    EXPECT_EQ(Select(engine, data.problem(), FlashPrefill(128, 0.5f)).fallback[0], FP_SELECTED) << engine.Name();
  }
}

TEST(SelectByHand, MassTakesTheSmallestSetAndMinBlocksTheTop) {
  OpData data(OneDimension({384, 384}));
  SetWeights(data, 64, {1, 4, 2, 1, 1e-9, 1e-9});
  // Tile 2 (rows 256..383) sees blocks 0..3 with all rows; 4 and 5 are its diagonal and weigh nothing. Shares: 1/8,
  // 4/8, 2/8, 1/8; in order 1, 2, 0, 3, where 0 and 3 are equal and the lower index goes first. Without outliers, and
  // with all keys of a block alike, Sketch is FlashPrefill times 64.
  ExpectKept(data, SketchByMass(64, 0.45f, 0, 1), 2, {1, 4, 5});
  ExpectKept(data, SketchByMass(64, 0.55f, 0, 1), 2, {1, 2, 4, 5});
  ExpectKept(data, SketchByMass(64, 0.8f, 0, 1), 2, {0, 1, 2, 4, 5});
  ExpectKept(data, SketchByMass(64, 0.95f, 0, 1), 2, {0, 1, 2, 3, 4, 5});
  ExpectKept(data, SketchByAlpha(64, 0.4f, 0, 1), 2, {1, 2, 4, 5});
  AnyPolicy top = SketchByMass(64, 0.45f, 0, 1);
  top.sketch.min_blocks = 3;
  ExpectKept(data, top, 2, {0, 1, 2, 4, 5});
  AnyPolicy two = FlashPrefill(64, 0.9f);
  two.flashprefill.min_blocks = 2;
  ExpectKept(data, two, 2, {1, 2, 4, 5});
  two.flashprefill.min_blocks = 1;
  ExpectKept(data, two, 2, {1, 4, 5});
}

TEST(SelectByHand, GainWeighsABlockByWhatIsLeft) {
  OpData data(OneDimension({384, 384}));
  SetWeights(data, 64, {1, 4, 2, 1, 1e-9, 1e-9});
  // The tile of the test above: in order 1, 2, 0, 3 with the shares 4/8, 2/8, 1/8, 1/8, of which 1, 4/8, 2/8 and 1/8
  // are left from each on. So their gains are .5, .25 * .7071 = .1768, .125 * .5 = .0625 and .125 * .3536 = .0442.
  ExpectKept(data, SketchByGain(64, 0.51f, 0, 1), 2, {4, 5});
  ExpectKept(data, SketchByGain(64, 0.49f, 0, 1), 2, {1, 4, 5});
  ExpectKept(data, SketchByGain(64, 0.178f, 0, 1), 2, {1, 4, 5});
  ExpectKept(data, SketchByGain(64, 0.175f, 0, 1), 2, {1, 2, 4, 5});
  ExpectKept(data, SketchByGain(64, 0.063f, 0, 1), 2, {1, 2, 4, 5});
  ExpectKept(data, SketchByGain(64, 0.062f, 0, 1), 2, {0, 1, 2, 4, 5});
  ExpectKept(data, SketchByGain(64, 0.045f, 0, 1), 2, {0, 1, 2, 4, 5});
  ExpectKept(data, SketchByGain(64, 0.044f, 0, 1), 2, {0, 1, 2, 3, 4, 5});
  AnyPolicy top = SketchByGain(64, 0.49f, 0, 1);
  top.sketch.min_blocks = 3;
  ExpectKept(data, top, 2, {0, 1, 2, 4, 5});
}

// Keys of a sequence of four blocks of 16: all queries 1, tile 0 of 64 rows, Lq = 64 rows behind them, so that every
// row sees every one of the four.
struct FourBlocks {
  OpData data{OneDimension({64, 128})};
  explicit FourBlocks(const std::vector<std::vector<double>>& keys) {
    SetWeights(data, 16, std::vector<double>(8, 1.0));
    const Sequence s = data.sequence(0);
    for (size_t b = 0; b < keys.size(); ++b) {
      for (size_t t = 0; t < 16; ++t) {
        data.SetKey(data.problem().k, s, static_cast<int64_t>(b * 16 + t), 0, 0, static_cast<float>(keys[b][t]));
      }
    }
  }
  std::vector<double> Energies(const AnyPolicy& policy) {
    std::vector<double> energies = Relative(ChoiceOf(data, policy, 0), 3);
    energies.resize(4);
    return energies;
  }
};

TEST(SketchByHand, OutliersStandForThemselves) {
  std::vector<double> one_far(16, 0.0), two_far(16, 0.0), even(16, 0.0);
  one_far[5] = 3;
  two_far[0] = 3, two_far[15] = 2;
  for (int t = 0; t < 16; ++t) even[t] = t % 2 ? 1 : -1;
  FourBlocks blocks({one_far, two_far, even, std::vector<double>(16, 0.0)});
  const double e1 = std::exp(1), e3 = std::exp(3);
  // One outlier. Block 0: e^3 and 15 zeros. Block 1 has mean 5/16: 3 is farther than 2; the rest have mean 2/15 and
  // variance 4/15 - (2/15)^2. Block 2: all are equally far (mean 0), so the first, -1, goes; the rest have mean 1/15
  // and variance 1 - 1/225. Block 3: 16 zeros, 16.
  const double rest1 = 15 * std::exp(2.0 / 15 + 0.5 * (4.0 / 15 - 4.0 / 225));
  const double rest2 = 15 * std::exp(1.0 / 15 + 0.5 * (1 - 1.0 / 225));
  ExpectNear({(15 + e3) / 16, (rest1 + e3) / 16, (rest2 + 1 / e1) / 16, 1},
             blocks.Energies(SketchByMass(16, 0.5f, 1, 1)));
  // None: block 2 is exp(1/2) wider than a point.
  const double mean0 = 3.0 / 16, var0 = 9.0 / 16 - mean0 * mean0, mean1 = 5.0 / 16, var1 = 13.0 / 16 - mean1 * mean1;
  ExpectNear({std::exp(mean0 + var0 / 2), std::exp(mean1 + var1 / 2), std::exp(0.5), 1},
             blocks.Energies(SketchByMass(16, 0.5f, 0, 1)));
  // Sixteen: every key for itself, no mean term.
  ExpectNear({(15 + e3) / 16, (14 + e3 + std::exp(2)) / 16, (e1 + 1 / e1) / 2, 1},
             blocks.Energies(SketchByMass(16, 0.5f, 16, 1)));
}

TEST(SketchByHand, AnOutlierSavesABlockThatItsMeanHides) {
  std::vector<double> needle(16, -1.0), plain(16, 1.0);
  needle[7] = 5;
  FourBlocks blocks({needle, plain, plain, plain});
  // FlashPrefill: mean -10/16, energy .54 against e. Sketch: e^5 + 15/e = 153.9 against 16 e = 43.5.
  EXPECT_FALSE(ChoiceOf(blocks.data, FlashPrefill(16, 0.5f), 0).kept[0]);
  const TileChoice sketch = ChoiceOf(blocks.data, SketchByAlpha(16, 0.5f, 4, 1), 0);
  EXPECT_TRUE(sketch.kept[0]);
  EXPECT_FALSE(sketch.kept[1]);
}

TEST(SketchByHand, WithTheQueryMetricOutliersAreWhatQueriesSee) {
  OpCase op = OneDimension({64, 128});
  op.head_dim = 2;
  OpData data(op);
  const Sequence s = data.sequence(0);
  for (int64_t i = 0; i < 64; ++i) data.SetQuery(s, i, 0, 0, 0), data.SetQuery(s, i, 0, 1, 1);
  for (int64_t t = 0; t < 128; ++t) {
    data.SetKey(data.problem().k, s, t, 0, 0, t == 3 ? 5 : 0);
    data.SetKey(data.problem().k, s, t, 0, 1, t == 7 ? 2 : 0);
  }
  // All queries are (0, 1), so the metric is (0, 1). Block 0 holds (5, 0) and (0, 2) beside 14 zeros. The farthest is
  // (5, 0), which no query sees: e^0, and 15 others of mean 2/15 and variance 4/15 - 4/225 along the queries. As they
  // measure, it is (0, 2): e^2, and 15 others at 0. The other blocks weigh 16.
  const AnyPolicy plain = SketchByMass(16, 0.5f, 1, 1);
  const double rest = 15 * std::exp(2.0 / 15 + 0.5 * (4.0 / 15 - 4.0 / 225));
  EXPECT_NEAR(Relative(ChoiceOf(data, plain, 0), 1)[0], (1 + rest) / 16, 1e-6);
  EXPECT_NEAR(Relative(ChoiceOf(data, ByQueries(plain), 0), 1)[0], (std::exp(2) + 15) / 16, 1e-6);
  // 18.92 / 16 against 22.39 / 16: with alpha = 1 / 1.3 block 0 alone is kept if its outlier is the right one.
  ExpectKept(data, SketchByAlpha(16, 1 / 1.3f, 1, 1), 0, {0, 1, 2, 3, 4, 5, 6, 7});
  ExpectKept(data, ByQueries(SketchByAlpha(16, 1 / 1.3f, 1, 1)), 0, {0, 4, 5, 6, 7});
}

TEST(SketchByHand, TheVarianceIsThePopulations) {
  std::vector<double> even(16), zero(16, 0.0);
  for (int t = 0; t < 16; ++t) even[t] = t % 2 ? 1 : -1;
  // Without outliers block 0 weighs e^(1/2) = 1.649 against 1, the threshold at .5965 is .983. With the sample's
  // variance, 16/15, it would be 1.017, and blocks 1 to 3 were out. Blocks 4 to 7 are the diagonal.
  ExpectKept(FourBlocks({even, zero, zero, zero}).data, SketchByAlpha(16, 0.5965f, 0, 1), 0, {0, 1, 2, 3, 4, 5, 6, 7});
  ExpectKept(FourBlocks({even, zero, zero, zero}).data, SketchByAlpha(16, 0.62f, 0, 1), 0, {0, 4, 5, 6, 7});
}

TEST(SketchByHand, OfEquallyFarKeysTheFirstIsTheOutlier) {
  std::vector<double> even(16), zero(16, 0.0);
  for (int t = 0; t < 16; ++t) even[t] = t % 2 ? 1 : -1;
  // With -1 as the outlier block 0 weighs 26.75 / 16 = 1.672, the threshold at .61 is 1.020 and the others are out;
  // with +1 it would weigh 1.612, and they would be in.
  ExpectKept(FourBlocks({even, zero, zero, zero}).data, SketchByAlpha(16, 0.61f, 1, 1), 0, {0, 4, 5, 6, 7});
}

TEST(SelectByHand, WhatIsNotFiniteDoesNotPoisonTheTile) {
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
