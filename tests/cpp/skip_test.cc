// Attention that skips what weighs next to nothing: cases worked out by hand, the rule against the reference on every
// instruction set, and the bound of the error against dense attention in double precision.
#include <gtest/gtest.h>

#include <cmath>

#include "by_hand.h"
#include "compare.h"

namespace flashprefill::test {
namespace {

AnyPolicy SkippingDense(float skip, int block_size = 128) {
  AnyPolicy policy = Dense(block_size);
  policy.As<fp_dense>().skip = skip;
  return policy;
}

// 128 queries after 384 keys, in chunks of 128: weights 64, 1, 0.5, and 8 on the diagonal. The values of chunk i are i.
OpData FourChunks() {
  OpData data(OneDimension({128, 512}));
  SetWeights(data, 128, {64, 1, 0.5, 8});
  const Sequence s = data.sequence(0);
  for (int64_t t = 0; t < 512; ++t) data.SetKey(data.problem().v, s, t, 0, 0, static_cast<float>(t / 128));
  return data;
}

TEST(SkipByHand, ChunksBelowTheShareOfTheHeaviestBefore) {
  const OpData data = FourChunks();
  // Of the heaviest weight, 64, the chunks have 1/64 = 0.0156, 0.5/64 = 0.0078 and 8/64 = 0.125. Row i sees i + 1 keys
  // of the diagonal.
  struct Case {
    float skip;
    std::vector<double> counted; // weights of chunks
    int blocks;
  };
  for (const Case& c : {Case{0.f, {64, 1, 0.5, 8}, -99}, Case{0.007f, {64, 1, 0.5, 8}, 0},
                        Case{0.008f, {64, 1, 0, 8}, 1}, Case{0.02f, {64, 0, 0, 8}, 2}, Case{0.12f, {64, 0, 0, 8}, 2}}) {
    for (const Engine& engine : AllEngines()) {
      const Prefilled result = Prefill(engine, data.problem(), SkippingDense(c.skip));
      for (const int64_t i : {0, 5, 127}) {
        double sum = 0, value = 0;
        for (int chunk = 0; chunk < 4; ++chunk) {
          const double keys = chunk < 3 ? 128 : static_cast<double>(i + 1);
          sum += c.counted[chunk] * keys, value += c.counted[chunk] * keys * chunk;
        }
        EXPECT_NEAR(result.attended.lse[i], std::log(sum), 1e-5) << engine.Name() << ", skip " << c.skip;
        EXPECT_NEAR(result.attended.out[i], value / sum, 1e-5) << engine.Name() << ", skip " << c.skip;
      }
      EXPECT_EQ(result.mask.skipped[0], c.blocks) << engine.Name() << ", skip " << c.skip;
      EXPECT_EQ(result.mask.fallback[0], FP_FALLBACK_DENSE);
    }
  }
}

TEST(SkipByHand, BlocksAreCountedInTheirOwnSize) {
  const OpData data = FourChunks();
  for (const Engine& engine : AllEngines()) {
    EXPECT_EQ(Prefill(engine, data.problem(), SkippingDense(0.02f, 64)).mask.skipped[0], 4) << engine.Name();
    // A chunk is 128 keys whatever a block is: of blocks of 256 the second holds 0.5 (skipped) and 8 (not).
    const Prefilled large = Prefill(engine, data.problem(), SkippingDense(0.02f, 256));
    EXPECT_EQ(large.mask.skipped[0], 1) << engine.Name(); // two chunks
  }
}

TEST(SkipByHand, WhatComesBeforeTheHeaviestCounts) {
  OpData data(OneDimension({128, 512}));
  SetWeights(data, 128, {1, 64, 1, 1});
  for (const Engine& engine : AllEngines()) {
    // The first chunk is met before there is anything to compare it with; the third and the diagonal are skipped.
    const Prefilled result = Prefill(engine, data.problem(), SkippingDense(0.5f));
    EXPECT_NEAR(result.attended.lse[127], std::log(128.0 * 65), 1e-5) << engine.Name();
    // 128 keys before the diagonal, and (1 + .. + 128) / 128 = 64.5 on it.
    EXPECT_EQ(result.mask.skipped[0], 2) << engine.Name();
  }
}

TEST(SkipByHand, EachRowDecidesForItself) {
  OpData data = FourChunks();
  const Sequence s = data.sequence(0);
  for (int64_t i = 0; i < 128; i += 3) data.SetQuery(s, i, 0, 0, 0); // to which all keys weigh 1
  for (const Engine& engine : AllEngines()) {
    const Attended result = Prefill(engine, data.problem(), SkippingDense(0.02f)).attended;
    for (int64_t i = 0; i < 128; ++i) {
      const double seen = static_cast<double>(i + 1);
      const double sum = i % 3 == 0 ? 384 + seen : 128 * 64 + 8 * seen;
      const double value = i % 3 == 0 ? 128 * (1 + 2) + 3 * seen : 8 * 3 * seen;
      EXPECT_NEAR(result.lse[i], std::log(sum), 1e-5) << engine.Name() << ", row " << i;
      EXPECT_NEAR(result.out[i], value / sum, 1e-5) << engine.Name() << ", row " << i;
    }
  }
}

TEST(SkipByHand, FewRowsSkipNothing) {
  for (const int rows : {8, 9}) {
    OpData data(OneDimension({rows, 512}));
    SetWeights(data, 128, {64, 1, 1, 1});
    const double sum = 128 * 64 + (rows == 8 ? 384 : 0);
    for (const Engine& engine : AllEngines()) {
      const Prefilled result = Prefill(engine, data.problem(), SkippingDense(0.5f));
      EXPECT_NEAR(result.attended.lse[rows - 1], std::log(sum), 1e-5) << engine.Name() << ", " << rows;
      EXPECT_EQ(result.mask.skipped[0], rows == 8 ? 0 : 3) << engine.Name();
    }
  }
}

TEST(SkipByHand, SpargeAttnSkipsAmongTheBlocksItKeeps) {
  // Its first stage keeps all four chunks at cdf 1, and its second leaves the same ones out as Dense's.
  const OpData data = FourChunks();
  for (const Engine& engine : AllEngines()) {
    const Prefilled result = Prefill(engine, data.problem(), Parse("spargeattn(cdf=1, skip=0.008)"));
    EXPECT_NEAR(result.attended.lse[127], std::log(128.0 * (64 + 1 + 8)), 1e-5) << engine.Name();
    EXPECT_EQ(result.mask.skipped[0], 2) << engine.Name(); // blocks of 64
  }
}

// Inputs of one dimension whose weights are powers of 4 and queries 0, 1/2 or 1: no ratio of two weights is near
// 2^-4.5, so every backend has to skip the same.
TEST(Skip, AsTheReferenceDoes) {
  std::mt19937_64 random(7);
  const auto pick = [&](int n) { return static_cast<int>(random() % static_cast<uint64_t>(n)); };
  const std::vector<std::vector<Lengths>> batches = {
      {{512, 512}}, {{300, 1011}}, {{127, 127}, {257, 640}}, {{9, 700}, {0, 5}, {1, 400}}, {{640, 640}}};
  const float skip = static_cast<float>(std::exp2(-4.5));
  int64_t skipped = 0;
  for (int i = 0; i < 60; ++i) {
    OpCase op;
    op.lengths = batches[i % batches.size()];
    op.q_layout = op.k_layout = Layout::kPacked;
    op.head_dim = 1, op.softmax_scale = 1;
    op.kv_heads = 1 + pick(2), op.group = 1 + pick(3);
    op.causal = i % 7 != 0;
    OpData data(op);
    const fp_problem& p = data.problem();
    for (int b = 0; b < p.batch; ++b) {
      const Sequence s = data.sequence(b);
      for (int64_t row = 0; row < s.q_len; ++row) {
        for (int h = 0; h < p.q_heads; ++h) data.SetQuery(s, row, h, 0, static_cast<float>(pick(3)) / 2);
      }
      for (int h = 0; h < p.kv_heads; ++h) {
        float key = 0;
        for (int64_t t = 0; t < s.k_len; ++t) {
          if (t % 32 == 0) key = static_cast<float>(pick(7) * std::log(4.0));
          data.SetKey(p.k, s, t, h, 0, key);
        }
      }
    }
    constexpr int kSizes[] = {128, 64, 16, 48, 256, 32};
    Mask mask = RandomMask(p, kSizes[i % 6], i % 2 == 0, i % 3 == 0, i % 4 == 0 ? 1 : 0.6, random());
    mask.view.skip = skip;
    Mask expected = mask;
    const Attended by_reference = Attend(Reference(), p, expected);
    SCOPED_TRACE(op.Describe());
    for (const Engine& engine : OtherEngines()) {
      Mask actual = mask;
      EXPECT_TRUE(Close(p, by_reference, Attend(engine, p, actual))) << engine.Name();
      EXPECT_EQ(expected.skipped, actual.skipped) << engine.Name();
    }
    for (const int32_t blocks : expected.skipped) skipped += std::max(0, blocks);
  }
  EXPECT_GT(skipped, 80);
}

// Of the weights of a row that sees n keys at most n skip / (1 + n skip) is lost. So no element of its output moves by
// more than that share of the range of the values, and its lse falls by log(1 + n skip) at most.
TEST(Skip, TheErrorIsBounded) {
  double largest_error = 0, closest = 0;
  for (const float skip : {1e-4f, 1e-2f, 0.2f}) {
    for (const std::vector<Lengths>& lengths :
         {std::vector<Lengths>{{700, 700}}, {{129, 1000}}, {{200, 200}, {9, 900}}}) {
      OpCase op;
      op.lengths = lengths;
      op.q_layout = op.k_layout = Layout::kPacked;
      op.kv_heads = 2, op.group = 2, op.head_dim = 32, op.softmax_scale = 0.6f;
      op.values = Values::kStructured;
      const OpData data(op);
      const fp_problem& p = data.problem();
      const Attended dense = Attend(Reference(), p, Mask(p, Dense().get()));
      for (const Engine& engine : AllEngines()) {
        const Attended result = Prefill(engine, p, SkippingDense(skip)).attended;
        for (int b = 0; b < p.batch; ++b) {
          const Sequence s = data.sequence(b);
          for (int64_t i = 0; i < s.q_len; ++i) {
            for (int h = 0; h < p.q_heads; ++h) {
              const int64_t row = LogicalRow(p, s, i, h), n = s.prefix + i + 1;
              const double mass = static_cast<double>(n) * skip, share = mass / (1 + mass);
              const double lost = dense.lse[row] - result.lse[row];
              ASSERT_GE(lost, -1e-4) << engine.Name();
              ASSERT_LE(lost, std::log1p(mass) + 1e-4) << engine.Name();
              for (int d = 0; d < p.head_dim; ++d) {
                float least = INFINITY, most = -INFINITY;
                for (int64_t t = 0; t < n; ++t) {
                  const float v = data.Key(p.v, s, t, h / 2, d);
                  least = std::min(least, v), most = std::max(most, v);
                }
                const double error = std::abs(dense.out[row * p.head_dim + d] - result.out[row * p.head_dim + d]);
                ASSERT_LE(error, share * (most - least) + 1e-4) << engine.Name() << ", skip " << skip << ", row " << i;
                largest_error = std::max(largest_error, error);
                if (skip < 0.1) closest = std::max(closest, error);
              }
            }
          }
        }
      }
    }
  }
  EXPECT_GT(largest_error, 0.05); // else nothing was skipped
  EXPECT_GT(closest, 1e-4);
}

TEST(Skip, RefusedOutsideOfItsRangeAndBesideLists) {
  const OpData data = FourChunks();
  const fp_problem& p = data.problem();
  size_t bytes = 0;
  for (const float skip : {-0.1f, 1.f, NAN}) {
    Mask mask(p, Dense().get());
    mask.view.skip = skip;
    EXPECT_EQ(fp_attend_workspace(&p, &mask.view, nullptr, &bytes), FP_INVALID_ARGUMENT);
    EXPECT_NE(std::string(fp_last_error()).find("mask.skip is"), std::string::npos) << fp_last_error();
    EXPECT_NE(std::string(fp_last_error()).find("at least 0 and below 1"), std::string::npos) << fp_last_error();
  }
  Mask mask = WithKeyLists(p, Mask(p, Dense().get()), 1, 16, 0.1, 1);
  mask.view.skip = 0.1f;
  EXPECT_EQ(fp_attend_workspace(&p, &mask.view, nullptr, &bytes), FP_INVALID_ARGUMENT);
  EXPECT_NE(std::string(fp_last_error()).find("key lists"), std::string::npos) << fp_last_error();
}

} // namespace
} // namespace flashprefill::test
