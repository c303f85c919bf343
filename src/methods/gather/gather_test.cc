// Gather: the policies that are compared with the reference, and lists worked out by hand. See by_hand.h for what
// inputs are.
#include <gtest/gtest.h>

#include <cmath>

#include "by_hand.h"
#include "core/key_list.h"
#include "method_suite.h"

namespace flashprefill::test {
namespace {

AnyPolicy Gather(int block_size, const std::string& fields) {
  return WithForced(Parse("gather(" + fields + ")", block_size), 1, 2, 0);
}

AnyPolicy PerHead(AnyPolicy policy) {
  policy.common.share_heads = 0;
  return policy;
}

std::vector<AnyPolicy> Policies(int block_size, int) {
  return {Gather(block_size, "gain=0.1"),
          PerHead(Gather(block_size, "gain=0.03, segment=256")),
          Gather(block_size, "budget=0.2, segment=200"),
          WithForced(Gather(block_size, "gain=0.002, max_keys=128"), 0, 0, 1),
          PerHead(WithForced(Gather(block_size, "budget=0.7, segment=1, max_keys=200"), 2, 1, 0)),
          WithForced(Gather(block_size, "gain=0.3, segment=5000"), 0, 3, 0)};
}

const RegisterSuite suite({.method = "gather", .policies = Policies, .scale = 1, .many = 3, .few = 3});

// 128 queries after 384 keys of no weight but for key 3 (in the sink), and a = 100, b = 200, c = 201, d = 300.
OpData FourHeavyKeys(int group = 1) {
  OpData data(OneDimension({128, 512}, group));
  SetWeights(data, 512, {1e-7});
  const Sequence s = data.sequence(0);
  const auto set = [&](int64_t key, double weight) {
    data.SetKey(data.problem().k, s, key, 0, 0, static_cast<float>(std::log(weight)));
  };
  set(3, 65536 - 352), set(100, 256), set(200, 64), set(201, 16), set(300, 16);
  return data;
}

using Keys = std::vector<int32_t>;

void ExpectList(const OpData& data, const AnyPolicy& policy, const Keys& keys, int64_t wanted) {
  for (const Engine& engine : AllEngines()) {
    const Mask mask = Select(engine, data.problem(), policy);
    EXPECT_EQ(mask.Keys(data.sequence(0), 0, 0), keys) << engine.Name() << ", " << Name(policy);
    EXPECT_EQ(KeyList::Of(mask.view, data.sequence(0), 0, 0).wanted, wanted) << engine.Name() << ", " << Name(policy);
  }
}

TEST(GatherByHand, GainWeighsAKeyByWhatIsLeft) {
  const OpData data = FourHeavyKeys();
  // The first row stands at 384, in block 6 of 64, and the window begins a block before: keys 64 to 319 are ranked.
  // Their shares of all 65536 are 256, 64, 16, 16; from each on 352, 96, 32, 16 are left. 128 share sqrt(rest):
  //     a  128 * 0.003906 * 0.07329 = 0.03664      c  128 * 0.000244 * 0.02210 = 0.000691
  //     b  128 * 0.000977 * 0.03827 = 0.004784     d  128 * 0.000244 * 0.01562 = 0.000488
  ExpectList(data, Gather(64, "gain=0.037"), {}, 0);
  ExpectList(data, Gather(64, "gain=0.036"), {100}, 1);
  ExpectList(data, Gather(64, "gain=0.0048"), {100}, 1);
  ExpectList(data, Gather(64, "gain=0.0047"), {100, 200}, 2);
  ExpectList(data, Gather(64, "gain=0.0007"), {100, 200}, 2);
  ExpectList(data, Gather(64, "gain=0.00068"), {100, 200, 201}, 3); // d weighs the same, but less is left
  ExpectList(data, Gather(64, "gain=0.00048"), {100, 200, 201, 300}, 4);
  // The sink, and from the window on; nothing else.
  ExpectKept(data, Gather(64, "gain=0.0048"), 0, {0, 5, 6, 7});
}

TEST(GatherByHand, ABudgetIsAShareOfTheRankedKeys) {
  const OpData data = FourHeavyKeys();
  ExpectList(data, Gather(64, "budget=0.0001"), {100}, 1); // of 256, rounded up
  ExpectList(data, Gather(64, "budget=0.0078125"), {100, 200}, 2);
  ExpectList(data, Gather(64, "budget=0.01"), {100, 200, 201}, 3); // of equal ones the lower
  ExpectList(data, Gather(64, "budget=0.015625"), {100, 200, 201, 300}, 4);
}

TEST(GatherByHand, AFullListHoldsTheBest) {
  const OpData data = FourHeavyKeys();
  // 192 of 256 are wanted, and there is room for 128: a to d, and of the others, which all weigh the same, the first.
  Keys keys;
  for (int32_t key = 64; key < 64 + 126; ++key) {
    if (key != 100) keys.push_back(key);
  }
  keys.resize(124);
  keys.insert(keys.end(), {100, 200, 201, 300});
  std::sort(keys.begin(), keys.end());
  ExpectList(data, Gather(64, "budget=0.75, max_keys=128"), keys, 192);
  for (const Engine& engine : AllEngines()) {
    const Mask mask = Select(engine, data.problem(), Gather(64, "budget=0.75, max_keys=128"));
    int64_t kept = 0, overflowed = -1;
    fp_stats stats;
    fp_stats_init(&stats);
    stats.kept = &kept, stats.overflowed = &overflowed;
    ASSERT_EQ(fp_mask_stats(&data.problem(), &mask.view, &stats), FP_OK);
    EXPECT_EQ(overflowed, 1);
    EXPECT_EQ(kept, 4 + 2); // 128 keys are two blocks of 64
    EXPECT_EQ(mask.counts[0], 6);
  }
}

TEST(GatherByHand, HeadsOfAListCountByTheirRootMeanSquare) {
  OpData data = FourHeavyKeys(2);
  const Sequence s = data.sequence(0);
  for (int64_t i = 0; i < 128; ++i) data.SetQuery(s, i, 1, 0, 0); // the second head sees all 512 keys alike
  Mask mask(data.problem(), Gather(64, "gain=0.1").get());
  reference::KeyChoice choice;
  // Tiles of 64 tokens, two per segment: one list.
  EXPECT_EQ(mask.view.segment_tiles, 2);
  const AnyPolicy policy = Gather(64, "gain=0.1");
  reference::Select(data.problem(), *policy.get(), mask.view, nullptr,
                    [&](const Sequence&, int64_t, int64_t, const reference::KeyChoice& c) { choice = c; });
  const auto rms = [](double a, double b) { return std::sqrt((a * a + b * b) / 2); };
  EXPECT_NEAR(choice.energy[100], rms(256.0 / 65536, 1.0 / 512), 1e-8);
  EXPECT_NEAR(choice.energy[300], rms(16.0 / 65536, 1.0 / 512), 1e-8);
  EXPECT_EQ(choice.energy[3], 0); // the sink is not ranked
  // Each query head for itself: the second keeps all 256, as even the last one's 128 / 512 sqrt(1 / 512) is 0.011.
  for (const Engine& engine : AllEngines()) {
    const Mask own = Select(engine, data.problem(), PerHead(Gather(64, "gain=0.0047")));
    EXPECT_EQ(own.Keys(s, 0, 0), (Keys{100, 200})) << engine.Name();
    EXPECT_EQ(own.Keys(s, 1, 0).size(), 256u) << engine.Name();
  }
}

TEST(GatherByHand, TilesOfASegmentShareItsListAndKeepItsOwnBlocks) {
  OpData data(OneDimension({512, 512}));
  SetWeights(data, 64, {1, 1e-7, 1e-7, 1e-7, 1e-7, 1e-7, 1e-7, 1e-7});
  data.SetKey(data.problem().k, data.sequence(0), 70, 0, 0, 3.f);
  const AnyPolicy policy = Gather(64, "gain=0.1, segment=256");
  // Tiles 2 and 3 are one segment, whose window begins in block 3, before its first row at 256: both keep blocks from
  // there on, and key 70, but not key 190 of block 2.
  ExpectTiles(data, policy, {{0, 1}, {0, 1, 2, 3}, {0, 3, 4, 5}, {0, 3, 4, 5, 6, 7}});
  for (const Engine& engine : AllEngines()) {
    const Mask mask = Select(engine, data.problem(), policy);
    EXPECT_EQ(mask.Keys(data.sequence(0), 0, 0), Keys{}) << engine.Name();
    EXPECT_EQ(mask.Keys(data.sequence(0), 0, 1), Keys{70}) << engine.Name();
  }
}

TEST(GatherByHand, AttentionOverAList) {
  OpData data = FourHeavyKeys();
  const Sequence s = data.sequence(0);
  for (int64_t t = 0; t < 512; ++t) data.SetKey(data.problem().v, s, t, 0, 0, t == 100 ? 1000 : t == 200 ? 1 : 0);
  for (const Engine& engine : AllEngines()) {
    const Prefilled result = Prefill(engine, data.problem(), Gather(64, "gain=0.036"));
    // Every row sees the sink's 65184 and key 100 with 256; what else it sees weighs nothing.
    EXPECT_NEAR(result.attended.out[0], 1000 * 256.0 / 65440, 1e-3) << engine.Name();
    EXPECT_NEAR(result.attended.lse[127], std::log(65440.0), 1e-5) << engine.Name();
  }
}

// A list never holds a key of its own segment or after. (That values of the future reach no row, whatever a list says,
// is in key_list_test.cc.)
TEST(Gather, ListsEndBeforeTheSegment) {
  OpCase op;
  op.lengths = {{600, 900}, {256, 256}, {1, 700}};
  op.q_layout = op.k_layout = Layout::kPacked;
  op.kv_heads = 2, op.group = 3;
  op.values = Values::kStructured;
  const OpData data(op);
  for (const AnyPolicy& policy : Policies(64, 6)) {
    for (const Engine& engine : AllEngines()) {
      const Mask mask = Select(engine, data.problem(), policy);
      for (int b = 0; b < 3; ++b) {
        const Sequence s = data.sequence(b);
        for (int64_t h = 0; h < mask.view.heads; ++h) {
          for (int64_t i = 0; i < Segments(mask.view, s); ++i) {
            const Keys keys = mask.Keys(s, h, i);
            const int64_t before = s.prefix + i * SegmentTokens(mask.view);
            EXPECT_LT(keys.empty() ? -1 : keys.back(), before) << engine.Name() << ", " << Name(policy);
          }
        }
      }
    }
  }
}

} // namespace
} // namespace flashprefill::test
