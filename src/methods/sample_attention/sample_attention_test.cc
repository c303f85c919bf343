// SampleAttention: the policies that are compared with the reference, and arithmetic done by hand.
#include <gtest/gtest.h>

#include "by_hand.h"
#include "method_suite.h"
#include "methods/sample_attention/row_sample.h"

namespace flashprefill::test {
namespace {

AnyPolicy SampleAttention(int block_size, float coverage, float sample_ratio, float window_ratio, int sample_rows) {
  AnyPolicy policy = Parse("sampleattention", block_size);
  auto& fields = policy.As<fp_sample_attention>();
  fields.coverage = coverage;
  fields.sample_ratio = sample_ratio;
  fields.window_ratio = window_ratio;
  fields.sample_rows = sample_rows;
  return policy;
}

std::vector<AnyPolicy> Policies(int block_size, int) {
  return {
      WithForced(SampleAttention(block_size, 0.7f, 0.2f, 0, 32), 0, 0, 0),
      WithForced(SampleAttention(block_size, 0.5f, 0.1f, 0.1f, 5), 1, 2, 1),
      SampleAttention(block_size, 0.4f, 0.5f, 0.05f, 40),
      SampleAttention(block_size, 0.3f, 1, 0, 128),
      AnyPolicy(FP_SAMPLE_ATTENTION),
  };
}

// Random keys alone make flat sums, so a larger scale makes them differ.
const RegisterSuite suite({.method = "sampleattention", .policies = Policies, .scale = 1});

// ---------------------------------------------------------------- by hand

TEST(SampleAttentionByHand, RowsAreSampledAtTheEndsOfEqualSegments) {
  fp_sample_attention policy = SampleAttention(64, 0.95f, 0.05f, 0, 32).As<fp_sample_attention>();
  Sequence s{};
  s.q_len = 6400; // 320 rows are 10 times 32: segments of 640
  const RowSample sample = methods::sample_attention::SampleOf(policy, s);
  EXPECT_EQ(sample.segments, 10);
  EXPECT_EQ(sample.Begin(0), 608);
  EXPECT_EQ(sample.End(0), 640);
  EXPECT_EQ(sample.Begin(9), 6368);
  EXPECT_EQ(sample.End(9), 6400);
  s.q_len = 10; // less than one: the last rows, as far as there are any
  EXPECT_EQ(methods::sample_attention::SampleOf(policy, s).segments, 1);
  EXPECT_EQ(methods::sample_attention::SampleOf(policy, s).Begin(0), 0);
  policy.sample_ratio = 1;
  s.q_len = 100; // three segments of 33, 33 and 34 rows: all but a few rows
  EXPECT_EQ(methods::sample_attention::SampleOf(policy, s).segments, 3);
  EXPECT_EQ(methods::sample_attention::SampleOf(policy, s).Begin(1), 34);
  EXPECT_EQ(methods::sample_attention::SampleOf(policy, s).End(2), 100);
}

TEST(SampleAttentionByHand, VerticalsAndSlashes) {
  OpData data(OneDimension({256, 256}));
  SetWeights(data, 64, {1, 4, 2, 1});
  // One sampled row, the last: it sees 64 keys of each block, shares 1/8, 4/8, 2/8, 1/8; by distance from block 3 those
  // are 1/8 (0), 2/8 (1), 4/8 (2), 1/8 (3). Tile 0 holds blocks 0 and 1, tile 1 blocks 2 and 3.
  const auto policy = [](float coverage) { return WithForced(SampleAttention(64, coverage, 0.001f, 0, 1), 0, 0, 0); };
  // 0.5: vertical 1; slash 2: blocks 0 (from 2) and 1 (from 3).
  ExpectKept(data, policy(0.5f), 0, {0, 1});
  ExpectKept(data, policy(0.5f), 1, {0, 1, 2, 3});
  // A chunk whose only tile lies in block 3 alone: vertical 1, slash 2 is block 1. From 0.51 on vertical 2 and slash
  // 1, which is block 2; from 0.76 on vertical 0, the first of the two that are equal, and slash 0.
  OpData chunk(OneDimension({64, 256}));
  SetWeights(chunk, 64, {1, 4, 2, 1});
  ExpectKept(chunk, policy(0.5f), 0, {1, 3});
  ExpectKept(chunk, policy(0.51f), 0, {1, 2, 3});
  ExpectKept(chunk, policy(0.76f), 0, {0, 1, 2, 3});
}

TEST(SampleAttentionByHand, SlashesFollowTheTile) {
  OpData data(OneDimension({512, 512}));
  // Blocks of 128, one per tile. The one sampled row, the last, finds everything in block 1, two blocks away.
  SetWeights(data, 128, {1e-6, 1, 1e-6, 1e-6});
  const AnyPolicy policy = WithForced(SampleAttention(128, 0.9f, 0.001f, 0, 1), 0, 0, 0);
  ExpectKept(data, policy, 0, {0});
  ExpectKept(data, policy, 1, {1});
  ExpectKept(data, policy, 2, {0, 1, 2});
  ExpectKept(data, policy, 3, {1, 3});
}

TEST(SampleAttentionByHand, TheWindowIsAShareOfTheKeys) {
  OpData data(OneDimension({512, 512}));
  SetWeights(data, 64, {1, 1e-9, 1e-9, 1e-9, 1e-9, 1e-9, 1e-9, 1e-9});
  // Vertical 0, and slash 7, which only the last tile has: block 0 again. A quarter of 512 keys is 128: tile 3 begins
  // at 384, so from key 257 on, which is in block 4; 129 keys would reach block 4 to its first key, 130 block 3.
  ExpectKept(data, WithForced(SampleAttention(64, 0.9f, 0.001f, 0, 1), 0, 0, 0), 3, {0, 6, 7});
  ExpectKept(data, WithForced(SampleAttention(64, 0.9f, 0.001f, 128.0f / 512, 1), 0, 0, 0), 3, {0, 4, 5, 6, 7});
  ExpectKept(data, WithForced(SampleAttention(64, 0.9f, 0.001f, 129.0f / 512, 1), 0, 0, 0), 3, {0, 4, 5, 6, 7});
  ExpectKept(data, WithForced(SampleAttention(64, 0.9f, 0.001f, 130.0f / 512, 1), 0, 0, 0), 3, {0, 3, 4, 5, 6, 7});
  // A share that is no whole number of keys is rounded up.
  ExpectKept(data, WithForced(SampleAttention(64, 0.9f, 0.001f, 129.5f / 512, 1), 0, 0, 0), 3, {0, 3, 4, 5, 6, 7});
}

} // namespace
} // namespace flashprefill::test
