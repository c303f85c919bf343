// SpargeAttn's first stage: the policies that are compared with the reference, and arithmetic done by hand.
#include <gtest/gtest.h>

#include <cmath>

#include "by_hand.h"
#include "method_suite.h"

namespace flashprefill::test {
namespace {

AnyPolicy SpargeByCdf(int block_size, float cdf, float similarity) {
  AnyPolicy policy = Parse("spargeattn", block_size);
  policy.As<fp_sparge_attn>().cdf = cdf;
  policy.As<fp_sparge_attn>().similarity = similarity;
  return policy;
}

AnyPolicy SpargeByTopk(int block_size, float topk, float similarity) {
  AnyPolicy policy = SpargeByCdf(block_size, NAN, similarity);
  policy.As<fp_sparge_attn>().topk = topk;
  return policy;
}

std::vector<AnyPolicy> Policies(int block_size, int) {
  return {
      SpargeByCdf(block_size, 0.7f, -0.1f),
      SpargeByCdf(block_size, 0.5f, 0.3f),
      WithForced(SpargeByCdf(block_size, 0.9f, 0.1f), 1, 2, 1),
      SpargeByTopk(block_size, 0.3f, -0.1f),
      SpargeByTopk(block_size, 0.5f, 0.2f),
      SpargeByCdf(block_size, 0.8f, NAN),
      SpargeByTopk(block_size, 0.4f, NAN),
  };
}

// Means of random blocks are short, so a larger scale makes their scores differ.
const RegisterSuite suite({.method = "spargeattn", .policies = Policies, .scale = 2});

// ---------------------------------------------------------------- by hand

TEST(SpargeAttnByHand, ProbabilitiesUpToTheShareAndAtLeastOne) {
  OpData data(OneDimension({64, 320}));
  SetWeights(data, 64, {1, 4, 2, 1, 1e-9});
  // In one dimension every unit vector is 1 or -1. Keys less their mean over the sequence have one sign in each block,
  // so the similarity of each is 1, and so is that of queries of 1. Probabilities 1/8, 4/8, 2/8, 1/8, 0; block 4 is the
  // diagonal. The block that reaches the share is left out, so 0.5 holds block 1, 0.7 no more, 0.75 block 2 too, 0.8 no
  // more, 0.875 block 0.
  ExpectKept(data, SpargeByCdf(64, 0.1f, 0.9f), 0, {1, 4});
  ExpectKept(data, SpargeByCdf(64, 0.51f, 0.9f), 0, {1, 4});
  ExpectKept(data, SpargeByCdf(64, 0.74f, 0.9f), 0, {1, 4});
  ExpectKept(data, SpargeByCdf(64, 0.76f, 0.9f), 0, {1, 2, 4});
  ExpectKept(data, SpargeByCdf(64, 0.88f, 0.9f), 0, {0, 1, 2, 4});
  ExpectKept(data, SpargeByCdf(64, 1.0f, 0.9f), 0, {0, 1, 2, 3, 4});
  // topk counts all five blocks of the sequence: 0.2 is one of them, 0.39 one, 0.4 two, 0.1 none.
  ExpectKept(data, SpargeByTopk(64, 0.2f, 0.9f), 0, {1, 4});
  ExpectKept(data, SpargeByTopk(64, 0.39f, 0.9f), 0, {1, 4});
  ExpectKept(data, SpargeByTopk(64, 0.4f, 0.9f), 0, {1, 2, 4});
  ExpectKept(data, SpargeByTopk(64, 0.1f, 0.9f), 0, {4});
}

TEST(SpargeAttnByHand, ATopkOfAllBlocksMakesEarlyTilesDense) {
  OpData data(OneDimension({512, 512}));
  SetWeights(data, 64, {1, 4, 2, 1, 3, 5, 2, 2});
  // Half of eight blocks is four: all that tile 1 sees, and of tile 3 the top four, 5, 1, 4 and, first of the twos, 2.
  ExpectKept(data, SpargeByTopk(64, 0.5f, -0.1f), 1, {0, 1, 2, 3});
  ExpectKept(data, SpargeByTopk(64, 0.5f, -0.1f), 3, {1, 2, 4, 5, 6, 7});
}

TEST(SpargeAttnByHand, WithoutCausalityNoBlockIsForced) {
  OpCase op = OneDimension({64, 288}); // the last block has 32 keys
  op.causal = false;
  OpData data(op);
  SetWeights(data, 64, {1, 4, 2, 1, 9});
  // Probabilities by the mean key of each block, however many keys it has: 1/17, 4/17, 2/17, 1/17, 9/17.
  ExpectKept(data, SpargeByCdf(64, 0.1f, 0.9f), 0, {4});
  ExpectKept(data, SpargeByCdf(64, 0.78f, 0.9f), 0, {1, 4});
  ExpectKept(data, SpargeByCdf(64, 0.89f, 0.9f), 0, {1, 2, 4});
  ExpectKept(data, SpargeByTopk(64, 0.4f, 0.9f), 0, {1, 4});
}

TEST(SpargeAttnByHand, BlocksWithoutSimilarityAreKept) {
  OpData data(OneDimension({64, 320}));
  SetWeights(data, 64, {1, 4, 2, 1, 1e-9});
  const Sequence s = data.sequence(0);
  // Block 3: 48 keys far above the mean, 16 far below it: (48 - 16)^2 / 64^2 = 0.25. It is kept where 0.25 is not above
  // the threshold, and then the others share what is left: 1/7, 4/7, 2/7.
  for (int64_t t = 0; t < 64; ++t) data.SetKey(data.problem().k, s, 192 + t, 0, 0, t < 48 ? 30.0f : -90.0f);
  ExpectKept(data, SpargeByCdf(64, 0.6f, 0.3f), 0, {1, 3, 4});
  // Where no threshold is given it is 0.6 with cdf and -0.1 with topk.
  ExpectKept(data, SpargeByCdf(64, 0.6f, NAN), 0, {1, 3, 4});
  ExpectKept(data, SpargeByTopk(64, 0.2f, NAN), 0, {1, 4});
  ExpectKept(data, SpargeByTopk(64, 0.2f, 0.6f), 0, {1, 3, 4});
  ExpectKept(data, SpargeByCdf(64, 0.55f, 0.3f), 0, {1, 3, 4}); // at least one
  ExpectKept(data, SpargeByCdf(64, 0.87f, 0.3f), 0, {1, 2, 3, 4});
  // Its mean is 0, a weight of 1, so where it is self-similar it is the block 3 of before.
  ExpectKept(data, SpargeByCdf(64, 0.6f, 0.2f), 0, {1, 4});
  // 60 queries of 1 and 4 of -1: 56^2 / 64^2 = 0.766. Above that everything is kept.
  for (int64_t i = 0; i < 4; ++i) data.SetQuery(s, i * 9, 0, 0, -1);
  ExpectKept(data, SpargeByCdf(64, 0.6f, 0.8f), 0, {0, 1, 2, 3, 4});
}

TEST(SpargeAttnByHand, SimilarityIsThatOfKeysLessTheirMean) {
  OpData data(OneDimension({64, 128}));
  SetWeights(data, 64, {1, 1});
  const Sequence s = data.sequence(0);
  // All keys are positive, so by themselves they are similar. Less their mean, 2, block 0 is half 1 and half -1.
  for (int64_t t = 0; t < 128; ++t) data.SetKey(data.problem().k, s, t, 0, 0, t >= 64 ? 2.0f : t % 2 ? 1.0f : 3.0f);
  ExpectKept(data, WithForced(SpargeByTopk(64, 0.0f, 0.5f), 0, 0, 0), 0, {0, 1});
  ExpectKept(data, WithForced(SpargeByTopk(64, 0.0f, -0.5f), 0, 0, 0), 0, {1});
}

} // namespace
} // namespace flashprefill::test
