// VSPrefill: masks of random indexers against the reference, kept logits, refusals, and arithmetic done by hand.
#include <gtest/gtest.h>

#include <cmath>
#include <iterator>
#include <random>
#include <string>

#include "by_hand.h"
#include "cases.h"
#include "core/vertical_slash.h"
#include "method_suite.h"

namespace flashprefill::test {
namespace {

// Without an indexer the forced blocks alone: what the lists of cases are compared with. Random indexers are below,
// since their shape is a case's own.
std::vector<AnyPolicy> Policies(int block_size, int) {
  return {Parse("vsprefill(rounding=blocks)", block_size),
          WithForced(Parse("vsprefill(vertical_mass=0.5, rounding=blocks)", block_size), 0, 1, 1)};
}

const RegisterSuite suite({.method = "vsprefill", .policies = Policies});

struct Indexer {
  std::vector<float> up, bias, vertical, slash;
  int kv_heads, head_dim, hidden;

  // Logits with a deviation of about 2.
  Indexer(int heads, int depth, int units, uint64_t seed) : kv_heads(heads), head_dim(depth), hidden(units) {
    std::mt19937_64 draw(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& to, size_t count, double deviation) {
      for (size_t i = 0; i < count; ++i) to.push_back(normal(draw) * static_cast<float>(deviation));
    };
    const auto count = static_cast<size_t>(heads) * units;
    fill(up, count * 2 * depth, 1 / std::sqrt(depth));
    fill(bias, count, 0.3);
    fill(vertical, count, 2 / std::sqrt(units));
    fill(slash, count, 2 / std::sqrt(units));
  }

  AnyPolicy At(AnyPolicy policy) const {
    auto& own = policy.As<fp_vsprefill>();
    own.kv_heads = kv_heads, own.head_dim = head_dim, own.hidden = hidden;
    own.up = up.data(), own.bias = bias.data(), own.vertical = vertical.data(), own.slash = slash.data();
    return policy;
  }
};

AnyPolicy Masses(int block_size, double vertical, double slash, int rounding = FP_ROUND_BLOCKS) {
  AnyPolicy policy = Parse("vsprefill", block_size);
  auto& own = policy.As<fp_vsprefill>();
  own.vertical_mass = static_cast<float>(vertical), own.slash_mass = static_cast<float>(slash);
  own.rounding = rounding;
  return policy;
}

std::vector<OpCase> Cases() {
  std::vector<OpCase> cases;
  for (const auto& list : {LengthCases(), HeadCases(), DtypeCases(), LayoutCases(), StrideCases(), PeakedCases()}) {
    cases.insert(cases.end(), list.begin(), list.end());
  }
  return Thinned(cases);
}

TEST(VSPrefill, MasksAreTheReferences) {
  constexpr int kSizes[] = {64, 16, 128, 48, 32};
  constexpr int kHidden[] = {5, 32, 33};
  const std::vector<OpCase> cases = Cases();
  TieCount ties;
  for (size_t i = 0; i < cases.size(); ++i) {
    const OpData data(cases[i]);
    const Indexer indexer(cases[i].kv_heads, cases[i].head_dim, kHidden[i % std::size(kHidden)], i + 1);
    AnyPolicy policy = Masses(kSizes[i % std::size(kSizes)], 0.02 + 0.03 * static_cast<double>(i % 4),
                              0.01 + 0.02 * static_cast<double>(i % 3));
    policy = WithForced(indexer.At(policy), i % 2, i % 3, i % 5 == 0);
    CompareSelect(data, i % 3 == 1 ? Shared(policy) : policy, ties);
  }
  ties.Print();
  EXPECT_LT(ties.share(), 0.05);
}

// In tokens: lists are as long as the reference's but for tokens near the threshold, and attention over them is what
// attention over the same lists is on the reference.
TEST(VSPrefill, InTokens) {
  const std::vector<OpCase> cases = Cases();
  for (size_t i = 0; i < cases.size(); i += 3) {
    const OpData data(cases[i]);
    const fp_problem& p = data.problem();
    const Indexer indexer(cases[i].kv_heads, cases[i].head_dim, 9, i + 1);
    const AnyPolicy policy = indexer.At(WithForced(Masses(64, 0.2, 0.1, FP_ROUND_TOKENS), 0, 1, 0));
    const Mask expected = Select(Reference(), p, policy);
    for (const Engine& engine : OtherEngines()) {
      SCOPED_TRACE(engine.Name() + ": " + data.op().Describe());
      const Prefilled both = Prefill(engine, p, policy, 2, data.op().out_strides);
      EXPECT_EQ(both.mask.bits, expected.bits);
      for (int b = 0; b < p.batch; ++b) {
        for (int h = 0; h < p.q_heads; ++h) {
          const int32_t* want = VerticalSlashAt(expected.view, b, h);
          const int32_t* have = VerticalSlashAt(both.mask.view, b, h);
          const double room = 1 + 0.02 * static_cast<double>(data.sequence(b).k_len);
          EXPECT_NEAR(have[0], want[0], room);
          EXPECT_NEAR(have[1], want[1], room);
        }
      }
      EXPECT_TRUE(Close(p, Attend(Reference(), p, both.mask), both.attended));
    }
  }
}

// ---------------------------------------------------------------- kept logits

struct KeptLogits {
  std::vector<fp_vsprefill_logits> entries;
  int64_t tokens;
  KeptLogits(const fp_problem& p, int64_t room)
      : entries(static_cast<size_t>(p.batch * p.kv_heads * room)), tokens(room) {}
  AnyPolicy At(AnyPolicy policy) {
    policy.As<fp_vsprefill>().logits = entries.data();
    policy.As<fp_vsprefill>().logit_tokens = tokens;
    return policy;
  }
};

OpCase Chunk(Lengths lengths) {
  OpCase op;
  op.lengths = {lengths, {lengths.q, lengths.k}};
  op.kv_heads = 2, op.group = 2, op.head_dim = 16;
  op.k_dtype = FP_BF16;
  return op;
}

TEST(VSPrefill, ChunksFindTheLogitsOfThePrefix) {
  const OpData first(Chunk({300, 300}));
  OpData second(Chunk({212, 512}));
  for (int b = 0; b < 2; ++b) { // the same keys and values; queries are not looked at
    for (int64_t t = 0; t < 300; ++t) {
      for (int h = 0; h < 2; ++h) {
        for (int d = 0; d < 16; ++d) {
          const Sequence from = first.sequence(b), to = second.sequence(b);
          second.SetKey(second.problem().k, to, t, h, d, first.Key(first.problem().k, from, t, h, d));
          second.SetKey(second.problem().v, to, t, h, d, first.Key(first.problem().v, from, t, h, d));
        }
      }
    }
  }
  const Indexer indexer(2, 16, 24, 7);
  const AnyPolicy policy = indexer.At(WithForced(Masses(16, 0.1, 0.02), 0, 0, 0));
  for (const Engine& engine : OtherEngines()) {
    const Mask alone = Select(engine, second.problem(), policy);
    KeptLogits kept(second.problem(), 600);
    Select(engine, first.problem(), kept.At(policy));
    for (int64_t t = 0; t < 600; ++t) EXPECT_EQ(kept.entries[t].of != 0, t < 300);
    const std::vector<fp_vsprefill_logits> before = kept.entries;
    EXPECT_TRUE(SameMask(second.problem(), alone, Select(engine, second.problem(), kept.At(policy)))) << engine.Name();
    for (int64_t t = 0; t < 300; ++t) EXPECT_EQ(kept.entries[t].of, before[t].of);
    EXPECT_NE(kept.entries[511].of, 0u);
    // They are read: a key that is said to weigh e^50 times as much is the one vertical, in block 0.
    kept.entries[5].vertical = 50;
    kept.entries[5].slash = -50;
    const Mask other = Select(engine, second.problem(), kept.At(policy));
    EXPECT_TRUE(TestBit(other.Row(0), 0)) << engine.Name();
    EXPECT_FALSE(SameMask(second.problem(), alone, other)) << engine.Name();
    // But not for another key.
    OpData changed(Chunk({212, 512}));
    EXPECT_TRUE(SameMask(changed.problem(), Select(engine, changed.problem(), policy),
                         Select(engine, changed.problem(), kept.At(policy))))
        << engine.Name();
    // Nor past the room that there is.
    KeptLogits little(second.problem(), 100);
    EXPECT_TRUE(SameMask(second.problem(), alone, Select(engine, second.problem(), little.At(policy))));
  }
}

// ---------------------------------------------------------------- refusals

std::string Refusal(const OpData& data, const AnyPolicy& policy) {
  size_t bytes = 0;
  EXPECT_EQ(fp_select_workspace(&data.problem(), policy.get(), nullptr, &bytes), FP_INVALID_ARGUMENT);
  return fp_last_error();
}

TEST(VSPrefill, RefusesWeightsOfAnotherModel) {
  const OpData data(Chunk({128, 128}));
  EXPECT_EQ(Refusal(data, Indexer(3, 16, 4, 1).At(Masses(64, 0.5, 0.5))),
            "the weights' kv_heads is 3; it must be the problem's (2)");
  EXPECT_EQ(Refusal(data, Indexer(2, 32, 4, 1).At(Masses(64, 0.5, 0.5))),
            "the weights' head_dim is 32; it must be the problem's (16)");
  EXPECT_EQ(Refusal(data, Parse("vsprefill(indexer=3)")),
            "indexer is 3; it must be 0 without weights: this way into the library does not bring them");
  const Indexer indexer(2, 16, 4, 1);
  AnyPolicy policy = indexer.At(Masses(64, 0.5, 0.5));
  policy.As<fp_vsprefill>().slash = nullptr;
  EXPECT_EQ(Refusal(data, policy), "slash is NULL; it must be the address of the indexer's weights");
  EXPECT_EQ(Refusal(data, Shared(indexer.At(Masses(64, 0.5, 0.5, FP_ROUND_TOKENS)))),
            "share_heads is 1; it must be 0 with FP_ROUND_TOKENS: lists of tokens are those of query heads");
}

// ---------------------------------------------------------------- by hand

// One KV head of one dimension and two units, SiLU(key) and SiLU(value): the first is the vertical's logit, the second
// the slash's. All keys and values are 0, with SiLU(0) = 0, but for key 200 and value 300, which are 10: SiLU(10) =
// 10 / (1 + e^-10) = 9.99955, so they weigh 22016 where the 511 others weigh 1: 0.977 of 22527.
OpData OneKeyOneDistance() {
  OpData data(OneDimension({512, 512}, 2));
  const Sequence s = data.sequence(0);
  for (int64_t t = 0; t < 512; ++t) {
    data.SetKey(data.problem().k, s, t, 0, 0, t == 200 ? 10 : 0);
    data.SetKey(data.problem().v, s, t, 0, 0, t == 300 ? 10 : 0);
  }
  return data;
}

Indexer TwoUnits() {
  Indexer indexer(1, 1, 2, 0);
  indexer.up = {1, 0, 0, 1}; // of each unit: its weight of the key, of the value
  indexer.bias = {0, 0};
  indexer.vertical = {1, 0};
  indexer.slash = {0, 1};
  return indexer;
}

TEST(VSPrefillByHand, VerticalsAndSlashes) {
  const OpData data = OneKeyOneDistance();
  const Indexer indexer = TwoUnits();
  // Vertical 200, in block 3. Slash 300: rows 256 to 383 of tile 2 find keys 0 to 83, blocks 0 and 1; rows 384 to 511
  // keys 84 to 211, blocks 1 to 3. The diagonal of tile m is 2 m and 2 m + 1.
  ExpectTiles(data, indexer.At(WithForced(Masses(64, 0.9, 0.9), 0, 0, 0)),
              {{0, 1}, {2, 3}, {0, 1, 3, 4, 5}, {1, 2, 3, 6, 7}});
  // 0.98 of 22527 is 22077: 61 more verticals, which are the first that weigh 1, 0 to 60, in block 0.
  ExpectTiles(data, indexer.At(WithForced(Masses(64, 0.98, 0.9), 0, 0, 0)),
              {{0, 1}, {0, 2, 3}, {0, 1, 3, 4, 5}, {0, 1, 2, 3, 6, 7}});
  // 67 of them: key 64 and 65 too, in block 1. (22016.5 + 66) / 22527.5 is 0.980249, with one more 0.980293.
  ExpectTiles(data, indexer.At(WithForced(Masses(64, 0.98027, 0.5), 0, 0, 0)),
              {{0, 1}, {0, 1, 2, 3}, {0, 1, 3, 4, 5}, {0, 1, 2, 3, 6, 7}});
}

TEST(VSPrefillByHand, SharedHeads) {
  const OpData data = OneKeyOneDistance();
  // Tiles of 64 tokens. Tile 5, rows 320 to 383, finds keys 20 to 83 at the distance 300.
  ExpectKept(data, TwoUnits().At(Shared(WithForced(Masses(64, 0.9, 0.9), 0, 0, 0))), 5, {0, 1, 3, 5});
}

TEST(VSPrefillByHand, Tokens) {
  const OpData data = OneKeyOneDistance();
  for (const Engine& engine : AllEngines()) {
    const Mask mask =
        Select(engine, data.problem(), TwoUnits().At(WithForced(Masses(64, 0.9, 0.9, FP_ROUND_TOKENS), 0, 0, 0)));
    EXPECT_EQ(Kept(mask, 3), (Blocks{6, 7})) << engine.Name();
    const VerticalSlash lists = VerticalSlash::Of(mask.view, 0, 1);
    ASSERT_EQ(lists.vertical_count, 1) << engine.Name();
    ASSERT_EQ(lists.slash_count, 1) << engine.Name();
    EXPECT_EQ(lists.verticals[0], 200);
    EXPECT_EQ(lists.slashes[0], 300);
    // Tile 3 has its 2 blocks, and 128 keys of the slash, 200 among them: 2 blocks more.
    EXPECT_EQ(mask.counts[3], 4) << engine.Name();
  }
}

TEST(VSPrefillByHand, WhatIsNotFiniteIsNotChosen) {
  OpData data = OneKeyOneDistance();
  data.SetKey(data.problem().k, data.sequence(0), 40, 0, 0, std::numeric_limits<float>::infinity());
  data.SetKey(data.problem().v, data.sequence(0), 100, 0, 0, std::numeric_limits<float>::quiet_NaN());
  ExpectTiles(data, TwoUnits().At(WithForced(Masses(64, 0.9, 0.9), 0, 0, 0)),
              {{0, 1}, {2, 3}, {0, 1, 3, 4, 5}, {1, 2, 3, 6, 7}});
}

} // namespace
} // namespace flashprefill::test
