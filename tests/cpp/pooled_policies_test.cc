// SpargeAttn's first stage and Prism: masks against the reference, and arithmetic done by hand for the reference
// itself.
#include <gtest/gtest.h>

#include <cmath>

#include "by_hand.h"
#include "cases.h"
#include "compare_select.h"

namespace flashprefill::test {
namespace {

// ---------------------------------------------------------------- against the reference

std::vector<AnyPolicy> PooledPolicies(int block_size) {
  return {
      SpargeByCdf(block_size, 0.7f, -0.1f),
      SpargeByCdf(block_size, 0.5f, 0.3f),
      WithForced(SpargeByCdf(block_size, 0.9f, 0.1f), 1, 2, 1),
      SpargeByTopk(block_size, 0.3f, -0.1f),
      SpargeByTopk(block_size, 0.5f, 0.2f),
      Prism(block_size, 0.95f),
      WithForced(Prism(block_size, 0.5f), 0, 0, 0),
      WithForced(Prism(block_size, 0.7f, 0, true), 0, 0, 1),
  };
}

void SelectOver(const std::vector<OpCase>& cases, size_t policies_per_case) {
  CompareOver(cases, PooledPolicies, policies_per_case, 2.0f); // means of random blocks are short
}

TEST(PooledPolicies, Lengths) { SelectOver(Thinned(LengthCases()), 9); }
TEST(PooledPolicies, Heads) { SelectOver(Thinned(HeadCases()), 4); }
TEST(PooledPolicies, Dtypes) { SelectOver(Thinned(DtypeCases()), 9); }
TEST(PooledPolicies, Layouts) { SelectOver(Thinned(LayoutCases()), 4); }
TEST(PooledPolicies, Strides) { SelectOver(Thinned(StrideCases()), 4); }
TEST(PooledPolicies, Far) { SelectOver(FarCases(), 9); }
TEST(PooledPolicies, Peaked) { SelectOver(Thinned(PeakedCases()), 9); }
TEST(PooledPolicies, Long) { SelectOver(Thinned(LongCases(), 2), 4); }
TEST(PooledPolicies, NanAndInf) { CompareWithNanAndInf(PooledPolicies(64)); }
TEST(PooledPolicies, SameBitsWhateverTheThreads) { CompareThreads(PooledPolicies(64)); }

TEST(PooledPolicies, OtherRotaryLayouts) {
  TieCount ties;
  OpCase op;
  op.lengths = {{300, 1500}};
  op.head_dim = 96;
  op.group = 2;
  op.values = Values::kStructured;
  const OpData data(op);
  for (const bool interleaved : {false, true}) {
    for (const int rotary_dim : {0, 32, 96}) {
      AnyPolicy policy = WithForced(Prism(64, 0.6f, rotary_dim, interleaved), 0, 0, 0);
      CompareSelect(data, policy, ties);
      policy.prism.high_pairs = 3;
      policy.prism.low_pairs = 5;
      CompareSelect(data, policy, ties);
    }
  }
  ties.Print();
}

// ---------------------------------------------------------------- by hand

TEST(SpargeByHand, ProbabilitiesUpToTheShareAndAtLeastOne) {
  OpData data(OneDimension({64, 320}));
  SetWeights(data, 64, {1, 4, 2, 1, 1e-9});
  // In one dimension every unit vector is 1 or -1. Keys less their mean over the sequence have one sign in each block,
  // so each is alike to itself with 1, and so are queries of 1. Probabilities 1/8, 4/8, 2/8, 1/8, 0; block 4 is the
  // diagonal. The crossing block is left out, so .5 holds block 1, .7 no more, .75 block 2 too, .8 no more, .875 block
  // 0.
  ExpectKept(data, SpargeByCdf(64, 0.1f, 0.9f), 0, {1, 4});
  ExpectKept(data, SpargeByCdf(64, 0.51f, 0.9f), 0, {1, 4});
  ExpectKept(data, SpargeByCdf(64, 0.74f, 0.9f), 0, {1, 4});
  ExpectKept(data, SpargeByCdf(64, 0.76f, 0.9f), 0, {1, 2, 4});
  ExpectKept(data, SpargeByCdf(64, 0.88f, 0.9f), 0, {0, 1, 2, 4});
  ExpectKept(data, SpargeByCdf(64, 1.0f, 0.9f), 0, {0, 1, 2, 3, 4});
  // topk counts all five blocks of the sequence: .2 is one of them, .39 one, .4 two, .1 none.
  ExpectKept(data, SpargeByTopk(64, 0.2f, 0.9f), 0, {1, 4});
  ExpectKept(data, SpargeByTopk(64, 0.39f, 0.9f), 0, {1, 4});
  ExpectKept(data, SpargeByTopk(64, 0.4f, 0.9f), 0, {1, 2, 4});
  ExpectKept(data, SpargeByTopk(64, 0.1f, 0.9f), 0, {4});
}

TEST(SpargeByHand, ATopkOfAllBlocksMakesEarlyTilesDense) {
  OpData data(OneDimension({512, 512}));
  SetWeights(data, 64, {1, 4, 2, 1, 3, 5, 2, 2});
  // Half of eight blocks is four: all that tile 1 sees, and of tile 3 the top four, 5, 1, 4 and, first of the twos, 2.
  ExpectKept(data, SpargeByTopk(64, 0.5f, -0.1f), 1, {0, 1, 2, 3});
  ExpectKept(data, SpargeByTopk(64, 0.5f, -0.1f), 3, {1, 2, 4, 5, 6, 7});
}

TEST(SpargeByHand, WhatIsNotAlikeIsKept) {
  OpData data(OneDimension({64, 320}));
  SetWeights(data, 64, {1, 4, 2, 1, 1e-9});
  const Sequence s = data.sequence(0);
  // Block 3: 48 keys far above the mean, 16 far below it: (48 - 16)^2 / 64^2 = .25. It is kept where .25 is not above
  // the threshold, and then the others share what is left: 1/7, 4/7, 2/7.
  for (int64_t t = 0; t < 64; ++t) data.SetKey(data.problem().k, s, 192 + t, 0, 0, t < 48 ? 30.0f : -90.0f);
  ExpectKept(data, SpargeByCdf(64, 0.6f, 0.3f), 0, {1, 3, 4});
  ExpectKept(data, SpargeByCdf(64, 0.55f, 0.3f), 0, {1, 3, 4}); // at least one
  ExpectKept(data, SpargeByCdf(64, 0.87f, 0.3f), 0, {1, 2, 3, 4});
  // Its mean is 0, a weight of 1, so where it counts as alike it is the last block 3 of before.
  ExpectKept(data, SpargeByCdf(64, 0.6f, 0.2f), 0, {1, 4});
  // 60 queries of 1 and 4 of -1: 56^2 / 64^2 = .766. Above that everything is kept.
  for (int64_t i = 0; i < 4; ++i) data.SetQuery(s, i * 9, 0, 0, -1);
  ExpectKept(data, SpargeByCdf(64, 0.6f, 0.8f), 0, {0, 1, 2, 3, 4});
}

TEST(SpargeByHand, LikenessIsThatOfKeysLessTheirMean) {
  OpData data(OneDimension({64, 128}));
  SetWeights(data, 64, {1, 1});
  const Sequence s = data.sequence(0);
  // All keys are positive, so by themselves they are alike. Less their mean, 2, block 0 is half 1 and half -1.
  for (int64_t t = 0; t < 128; ++t) data.SetKey(data.problem().k, s, t, 0, 0, t >= 64 ? 2.0f : t % 2 ? 1.0f : 3.0f);
  ExpectKept(data, WithForced(SpargeByTopk(64, 0.0f, 0.5f), 0, 0, 0), 0, {0, 1});
  ExpectKept(data, WithForced(SpargeByTopk(64, 0.0f, -0.5f), 0, 0, 0), 0, {1});
}

// Two dimensions are one rotary pair, and both bands are both dimensions.
TEST(PrismByHand, ABandOfAllDimensionsIsThePlainSoftmax) {
  OpCase op = OneDimension({64, 320});
  op.head_dim = 2;
  OpData data(op);
  const Sequence s = data.sequence(0);
  const double weights[5] = {1, 4, 2, 1, 1e-9};
  for (int64_t i = 0; i < 64; ++i) data.SetQuery(s, i, 0, 0, 1), data.SetQuery(s, i, 0, 1, 0);
  for (int64_t t = 0; t < 320; ++t) {
    data.SetKey(data.problem().k, s, t, 0, 0, static_cast<float>(std::log(weights[t / 64])));
    data.SetKey(data.problem().k, s, t, 0, 1, 0);
  }
  // tau = sqrt(2 / 2) * 1 * 1, scores q.k * softmax_scale: shares 1/8, 4/8, 2/8, 1/8.
  ExpectKept(data, WithForced(Prism(64, 0.49f), 0, 0, 0), 0, {1, 4});
  ExpectKept(data, WithForced(Prism(64, 0.51f), 0, 0, 0), 0, {1, 2, 4});
  ExpectKept(data, WithForced(Prism(64, 0.8f), 0, 0, 0), 0, {0, 1, 2, 4});
  // Forced blocks are joined afterwards.
  ExpectKept(data, Prism(64, 0.49f), 0, {0, 1, 3, 4});
}

TEST(PrismByHand, EachBandIsScoredWithTheEnergyOfAll) {
  OpCase op = OneDimension({64, 320});
  op.head_dim = 4; // two pairs: (0, 2) fast and (1, 3) slow
  OpData data(op);
  const Sequence s = data.sequence(0);
  AnyPolicy policy = WithForced(Prism(64, 0.9f), 0, 0, 0);
  policy.prism.high_pairs = policy.prism.low_pairs = 1;
  // The fast pair is a tenth of the slow one: the sum over all dimensions would not see it. Block 1 is what the slow
  // dimension asks for, block 2 what the fast one does.
  for (int64_t i = 0; i < 64; ++i) {
    for (int d = 0; d < 4; ++d) data.SetQuery(s, i, 0, d, d == 0 ? 0.1f : d == 1 ? 1.0f : 0.0f);
  }
  for (int64_t t = 0; t < 320; ++t) {
    for (int d = 0; d < 4; ++d) data.SetKey(data.problem().k, s, t, 0, d, 0);
    if (t / 64 == 1) data.SetKey(data.problem().k, s, t, 0, 1, 8);
    if (t / 64 == 2) data.SetKey(data.problem().k, s, t, 0, 0, 0.8f);
  }
  // Root mean squares: q over all sqrt(1.01 / 4), fast sqrt(.01 / 2), slow sqrt(1 / 2); keys likewise, times 8 and a
  // common factor. Fast: tau = sqrt(1/2) * (.0707 / .5025)^2 = .0140, score of block 2 = .1 * .8 * sqrt(2) / tau
  // = 8.08; slow: tau = sqrt(1/2) * (.7071 / .5025)^2 = 1.400, score of block 1 = 8 * sqrt(2) / tau = 8.08. Each has
  // e^8.08 = 3230 against four blocks of 1.
  ExpectKept(data, policy, 0, {1, 2, 4});
  // One band of all: 8 against .08, times the softmax_scale of 1.
  policy.prism.high_pairs = policy.prism.low_pairs = 2;
  ExpectKept(data, policy, 0, {1, 4});
  // Interleaved the pairs are (0, 1) and (2, 3): the fast band sees both, and the slow one is empty of energy.
  policy.prism.high_pairs = policy.prism.low_pairs = 1;
  policy.prism.interleaved = 1;
  ExpectKept(data, policy, 0, {1, 4});
}

} // namespace
} // namespace flashprefill::test
