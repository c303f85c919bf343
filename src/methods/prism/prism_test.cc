// Prism: the policies that are compared with the reference, and arithmetic done by hand.
#include <gtest/gtest.h>

#include <cmath>

#include "by_hand.h"
#include "method_suite.h"

namespace flashprefill::test {
namespace {

AnyPolicy Prism(int block_size, float mass, int rotary_dim = 0, bool interleaved = false) {
  AnyPolicy policy = Parse("prism", block_size);
  auto& fields = policy.As<fp_prism>();
  fields.mass = mass;
  fields.rotary_dim = rotary_dim;
  fields.interleaved = interleaved;
  return policy;
}

std::vector<AnyPolicy> Policies(int block_size, int) {
  return {
      WithForced(Prism(block_size, 0.5f), 0, 0, 0),
      Prism(block_size, 0.95f),
      WithForced(Prism(block_size, 0.7f, 0, true), 0, 0, 1),
  };
}

// Means of random blocks are short, so a larger scale makes their scores differ.
const RegisterSuite suite({.method = "prism", .policies = Policies, .scale = 2});

TEST(Prism, OtherRotaryLayouts) {
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
      policy.As<fp_prism>().high_pairs = 3;
      policy.As<fp_prism>().low_pairs = 5;
      CompareSelect(data, policy, ties);
    }
  }
  ties.Print();
}

// ---------------------------------------------------------------- by hand

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
  policy.As<fp_prism>().high_pairs = policy.As<fp_prism>().low_pairs = 1;
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
  // Root mean squares: q over all sqrt(1.01 / 4), fast sqrt(0.01 / 2), slow sqrt(1 / 2); keys likewise, times 8 and a
  // common factor. Fast: tau = sqrt(1/2) * (0.0707 / 0.5025)^2 = 0.0140, score of block 2 = 0.1 * 0.8 * sqrt(2) / tau
  // = 8.08; slow: tau = sqrt(1/2) * (0.7071 / 0.5025)^2 = 1.400, score of block 1 = 8 * sqrt(2) / tau = 8.08. Each has
  // e^8.08 = 3230 against four blocks of 1.
  ExpectKept(data, policy, 0, {1, 2, 4});
  // One band of all: 8 against 0.08, times the softmax_scale of 1.
  policy.As<fp_prism>().high_pairs = policy.As<fp_prism>().low_pairs = 2;
  ExpectKept(data, policy, 0, {1, 4});
  // Interleaved the pairs are (0, 1) and (2, 3): the fast band sees both, and the slow one is empty of energy.
  policy.As<fp_prism>().high_pairs = policy.As<fp_prism>().low_pairs = 1;
  policy.As<fp_prism>().interleaved = 1;
  ExpectKept(data, policy, 0, {1, 4});
}

} // namespace
} // namespace flashprefill::test
