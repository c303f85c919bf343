// Sketch: the policies that are compared with the reference, and arithmetic done by hand. See by_hand.h for what inputs
// are.
#include <gtest/gtest.h>

#include <cmath>

#include "by_hand.h"
#include "method_suite.h"

namespace flashprefill::test {
namespace {

// Without forced blocks beyond the diagonal, so that the score decides.
AnyPolicy SketchByMass(int block_size, float mass, int outliers = 4, int query_pool = 16) {
  AnyPolicy policy = Parse("sketch", block_size);
  auto& fields = policy.As<fp_sketch>();
  fields.mass = mass;
  fields.outliers = outliers;
  fields.query_pool = query_pool;
  return WithForced(policy, 0, 0, 0);
}

AnyPolicy SketchByAlpha(int block_size, float alpha, int outliers = 4, int query_pool = 16) {
  AnyPolicy policy = SketchByMass(block_size, NAN, outliers, query_pool);
  policy.As<fp_sketch>().alpha = alpha;
  return policy;
}

AnyPolicy SketchByGain(int block_size, float gain, int outliers = 4, int query_pool = 16) {
  AnyPolicy policy = SketchByMass(block_size, NAN, outliers, query_pool);
  policy.As<fp_sketch>().gain = gain;
  return policy;
}

AnyPolicy ByQueries(AnyPolicy policy) {
  policy.As<fp_sketch>().query_metric = 1;
  return policy;
}

AnyPolicy AtLeast(int min_blocks, AnyPolicy policy) {
  policy.As<fp_sketch>().min_blocks = min_blocks;
  return policy;
}

std::vector<AnyPolicy> Policies(int block_size, int) {
  std::vector<AnyPolicy> policies = {
      SketchByMass(block_size, 0.7f),
      SketchByAlpha(block_size, 0.4f),
      SketchByAlpha(block_size, 0.5f, 0, 5),
      SketchByMass(block_size, 0.5f, 16, 16),
      AtLeast(2, SketchByMass(block_size, 0.3f, 2, 1)),
      SketchByGain(block_size, 0.15f),
      ByQueries(SketchByMass(block_size, 0.6f, 2, 16)),
      AtLeast(1, ByQueries(SketchByGain(block_size, 0.08f, 3, 32))),
  };
  const size_t own = policies.size();
  for (size_t i = 0; i < own; ++i) policies.push_back(Shared(policies[i]));
  return policies;
}

const RegisterSuite suite({.method = "sketch", .policies = Policies, .many = 5, .few = 3});

TEST(SketchByHand, MassTakesTheSmallestSetAndMinBlocksTheTop) {
  OpData data(OneDimension({384, 384}));
  SetWeights(data, 64, {1, 4, 2, 1, 1e-9, 1e-9});
  // Tile 2 (rows 256..383) sees blocks 0..3 with all rows; 4 and 5 are its diagonal and weigh nothing. Shares: 1/8,
  // 4/8, 2/8, 1/8; in order 1, 2, 0, 3, where 0 and 3 are equal and the lower index goes first. Without outliers, and
  // with all keys of a block equal, Sketch is FlashPrefill times 64.
  ExpectKept(data, SketchByMass(64, 0.45f, 0, 1), 2, {1, 4, 5});
  ExpectKept(data, SketchByMass(64, 0.55f, 0, 1), 2, {1, 2, 4, 5});
  ExpectKept(data, SketchByMass(64, 0.8f, 0, 1), 2, {0, 1, 2, 4, 5});
  ExpectKept(data, SketchByMass(64, 0.95f, 0, 1), 2, {0, 1, 2, 3, 4, 5});
  ExpectKept(data, SketchByAlpha(64, 0.4f, 0, 1), 2, {1, 2, 4, 5});
  AnyPolicy top = SketchByMass(64, 0.45f, 0, 1);
  top.As<fp_sketch>().min_blocks = 3;
  ExpectKept(data, top, 2, {0, 1, 2, 4, 5});
}

TEST(SketchByHand, GainWeighsABlockByWhatIsLeft) {
  OpData data(OneDimension({384, 384}));
  SetWeights(data, 64, {1, 4, 2, 1, 1e-9, 1e-9});
  // The tile of the test above: in order 1, 2, 0, 3 with the shares 4/8, 2/8, 1/8, 1/8, of which 1, 4/8, 2/8 and 1/8
  // are left from each on. So their gains are 0.5, 0.25 * 0.7071 = 0.1768, 0.125 * 0.5 = 0.0625 and 0.125 * 0.3536 =
  // 0.0442.
  ExpectKept(data, SketchByGain(64, 0.51f, 0, 1), 2, {4, 5});
  ExpectKept(data, SketchByGain(64, 0.49f, 0, 1), 2, {1, 4, 5});
  ExpectKept(data, SketchByGain(64, 0.178f, 0, 1), 2, {1, 4, 5});
  ExpectKept(data, SketchByGain(64, 0.175f, 0, 1), 2, {1, 2, 4, 5});
  ExpectKept(data, SketchByGain(64, 0.063f, 0, 1), 2, {1, 2, 4, 5});
  ExpectKept(data, SketchByGain(64, 0.062f, 0, 1), 2, {0, 1, 2, 4, 5});
  ExpectKept(data, SketchByGain(64, 0.045f, 0, 1), 2, {0, 1, 2, 4, 5});
  ExpectKept(data, SketchByGain(64, 0.044f, 0, 1), 2, {0, 1, 2, 3, 4, 5});
  AnyPolicy top = SketchByGain(64, 0.49f, 0, 1);
  top.As<fp_sketch>().min_blocks = 3;
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
  // FlashPrefill: mean -10/16, energy 0.54 against e. Sketch: e^5 + 15/e = 153.9 against 16 e = 43.5.
  EXPECT_FALSE(ChoiceOf(blocks.data, WithForced(Parse("flashprefill(alpha=0.5)", 16), 0, 0, 0), 0).kept[0]);
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
  // All queries are (0, 1), so the metric is (0, 1). Block 0 holds (5, 0), (0, 2) and 14 zeros. The farthest is
  // (5, 0), which no query tells apart: e^0, and 15 others of mean 2/15 and variance 4/15 - 4/225 along the queries. By
  // the metric it is (0, 2): e^2, and 15 others at 0. The other blocks weigh 16.
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
  // Without outliers block 0 weighs e^(1/2) = 1.649 against 1, the threshold at 0.5965 is 0.983. With the sample's
  // variance, 16/15, it would be 1.017, and blocks 1 to 3 would be out. Blocks 4 to 7 are the diagonal.
  ExpectKept(FourBlocks({even, zero, zero, zero}).data, SketchByAlpha(16, 0.5965f, 0, 1), 0, {0, 1, 2, 3, 4, 5, 6, 7});
  ExpectKept(FourBlocks({even, zero, zero, zero}).data, SketchByAlpha(16, 0.62f, 0, 1), 0, {0, 4, 5, 6, 7});
}

TEST(SketchByHand, OfEquallyFarKeysTheFirstIsTheOutlier) {
  std::vector<double> even(16), zero(16, 0.0);
  for (int t = 0; t < 16; ++t) even[t] = t % 2 ? 1 : -1;
  // With -1 as the outlier block 0 weighs 26.75 / 16 = 1.672, the threshold at 0.61 is 1.020 and the others are out;
  // with +1 it would weigh 1.612, and they would be in.
  ExpectKept(FourBlocks({even, zero, zero, zero}).data, SketchByAlpha(16, 0.61f, 1, 1), 0, {0, 4, 5, 6, 7});
}

} // namespace
} // namespace flashprefill::test
