// The guard: rows drawn, what a mask keeps of them against the reference and against softmax by hand, the bounds that
// follow, and repairs.
#include "core/guard.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "cases.h"
#include "compare.h"
#include "core/method.h"
#include "core/philox.h"
#include "core/validate.h"
#include "engine.h"

namespace flashprefill::test {
namespace {

// ---------------------------------------------------------------- draws and bounds

// Two of the known answers that come with the authors' Random123.
TEST(Guard, RandomWordsAreThePublishedOnes) {
  using Words = std::array<uint32_t, 4>;
  EXPECT_EQ(Philox({0, 0, 0, 0}, 0), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  const uint32_t ones = 0xffffffff;
  EXPECT_EQ(Philox({ones, ones, ones, ones}, ~uint64_t{0}), (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
}

std::vector<AuditRow> Draw(const OpData& data, const Mask& mask, const fp_guard& guard, int head, int64_t* sparse) {
  std::vector<AuditRow> rows(2000);
  const Sequence s = data.sequence(0);
  rows.resize(static_cast<size_t>(DrawRows(data.problem(), mask.view, guard, s, head, 0, rows.data(), sparse)));
  return rows;
}

TEST(Guard, DrawsOneRowOfEachStratumOfTheRowsThatMissSomething) {
  const OpData data({.lengths = {{1000, 1300}}, .kv_heads = 2});
  Mask mask = RandomMask(data.problem(), 64, false, false, 0.5, 1);
  const Geometry g = Geometry::Of(data.problem(), mask.view);
  const Sequence s = data.sequence(0);
  FillRow(mask.Row(g.Row(s, 0, 2)), g.words, 64 * g.words); // tile 2 of head 0 keeps everything
  int64_t sparse;
  const std::vector<AuditRow> rows = Draw(data, mask, GuardOf(FP_GUARD_OBSERVE, 40), 0, &sparse);
  ASSERT_EQ(rows.size(), 40u);
  EXPECT_EQ(sparse, 1000 - 128);
  for (int64_t j = 0; j < 40; ++j) {
    const int64_t row = rows[j].row;
    EXPECT_TRUE(row < 256 || row >= 384) << row;
    const int64_t counted = row < 256 ? row : row - 128;
    EXPECT_GE(counted, j * sparse / 40);
    EXPECT_LT(counted, (j + 1) * sparse / 40);
  }
  int64_t other;
  EXPECT_EQ(Draw(data, mask, GuardOf(FP_GUARD_OBSERVE, 0), 1, &other).size(), 25u); // 32 per prompt of 1300 tokens
  EXPECT_EQ(other, 1000);
  EXPECT_EQ(Draw(data, mask, GuardOf(FP_GUARD_OBSERVE, 5000), 1, &other).size(), 1000u);
}

TEST(Guard, DrawsAreUniformInsideStrata) {
  const OpData data({.lengths = {{256, 256}}});
  const Mask mask = RandomMask(data.problem(), 16, false, false, 0.3, 1);
  std::vector<int> hits(256);
  for (uint64_t seed = 0; seed < 3200; ++seed) {
    int64_t sparse;
    for (const AuditRow& row : Draw(data, mask, GuardOf(FP_GUARD_OBSERVE, 8, 0.9f, seed), 0, &sparse)) ++hits[row.row];
  }
  // 100 expected of each row, by a binomial with a deviation of 10.
  for (const int count : hits) EXPECT_NEAR(count, 100, 50);
}

TEST(Guard, BoundsOfAHeadByHand) {
  const float recalls[] = {1.0f, 0.9f, 0.8f, 0.7f};
  std::vector<AuditRow> rows;
  for (const float recall : recalls) rows.push_back({0, 0, 0, recall < 0.85f ? 3 : 5, 1 - recall, recall});
  float scratch[4];
  const HeadAudit head = Summarise(rows, 400, 0.9, scratch);
  EXPECT_NEAR(head.recall, 0.85, 1e-6);
  // One row more, of 0.55: mean .79, deviation .17464; t of 4 degrees of freedom at 95 % is 2.132.
  EXPECT_NEAR(head.low, 0.79 - 2.132 * 0.17464 / std::sqrt(5.0), 3e-3);
  EXPECT_NEAR(head.p05, 0.715, 1e-6);
  EXPECT_EQ(head.missed_block, 3);
  EXPECT_TRUE(head.is_low);
  EXPECT_FALSE(Summarise(rows, 400, 0.6, scratch).is_low);
  EXPECT_NEAR(Summarise(rows, 4, 0.9, scratch).low, 0.85, 1e-6) << "all rows were audited";
  rows[3].recall = 0.4f;
  EXPECT_TRUE(Summarise(rows, 400, 1e-3, scratch).is_low) << "one row in four keeps less than half";
}

TEST(Guard, CertificateByHand) {
  std::vector<AuditRow> rows(4001);
  for (size_t i = 0; i < rows.size(); ++i) rows[i].recall = i % 2 ? 1.0f : 0.9f;
  const double log = std::log(2000.0), n = 4001;
  EXPECT_NEAR(Certificate(MomentsOf(rows), 1e-3), 0.95 - std::sqrt(2 * 0.0025 * log / n) - 7 * log / (3 * (n - 1)),
              1e-4);
  EXPECT_EQ(Certificate({}, 1e-3), 1);
  EXPECT_EQ(Certificate({1, 1, 1}, 1e-3), 0);
}

// ---------------------------------------------------------------- recall

// Recall of a row by hand: bits alone.
double RecallByHand(const OpData& data, const Mask& mask, const Sequence& s, int64_t row, int64_t head) {
  const fp_problem& p = data.problem();
  const Geometry g = Geometry::Of(p, mask.view);
  const uint64_t* bits = mask.Row(g.Row(s, head / g.heads_per_tile, row / g.tile_tokens));
  double kept = 0, all = 0;
  for (int64_t t = 0; t < (p.causal ? s.prefix + row + 1 : s.k_len); ++t) {
    double z = 0;
    for (int64_t d = 0; d < p.head_dim; ++d) {
      z += double{data.Query(s, row, head, d)} * data.Key(p.k, s, t, head / g.group, d);
    }
    const double weight = std::exp(z * p.softmax_scale);
    all += weight;
    if (TestBit(bits, t / g.block_size)) kept += weight;
  }
  return kept / all;
}

TEST(Guard, AllRowsAuditedGiveTheTrueRecall) {
  for (const bool shared : {false, true}) {
    const OpData data({.lengths = {{150, 210}, {0, 0}, {77, 77}},
                       .kv_heads = 2,
                       .group = 3,
                       .q_layout = Layout::kPacked,
                       .k_layout = Layout::kPaged});
    const fp_problem& p = data.problem();
    Mask mask = RandomMask(p, 16, shared, shared, 0.5, 7);
    const Geometry g = Geometry::Of(p, mask.view);
    for (const Engine& engine : AllEngines()) {
      const GuardResults results = Audit(engine, p, mask, GuardOf(FP_GUARD_OBSERVE, 1000));
      for (int b = 0; b < p.batch; ++b) {
        const Sequence s = data.sequence(b);
        for (int64_t h = 0; h < p.q_heads; ++h) {
          double sum = 0;
          for (int64_t i = 0; i < s.q_len; ++i) sum += RecallByHand(data, mask, s, i, h);
          const size_t at = static_cast<size_t>(b * p.q_heads + h);
          ASSERT_EQ(results.rows[at], s.q_len) << engine.Name();
          if (s.q_len == 0) continue;
          EXPECT_NEAR(results.recall[at], sum / static_cast<double>(s.q_len), 2e-5) << engine.Name();
          EXPECT_EQ(results.low[at], results.recall[at]) << "nothing was left to chance";
        }
      }
    }
    EXPECT_GT(g.mask_heads, 0);
  }
}

TEST(Guard, OneDroppedBlockIsFound) {
  const OpData data({.lengths = {{384, 384}}, .kv_heads = 1, .group = 2, .values = Values::kStructured});
  const fp_problem& p = data.problem();
  for (const Engine& engine : AllEngines()) {
    Mask mask = RandomMask(p, 64, false, false, 1.0, 1);
    const GuardResults whole = Audit(engine, p, mask, GuardOf(FP_GUARD_STRICT, 50));
    for (size_t h = 0; h < 2; ++h) {
      EXPECT_EQ(whole.recall[h], 1);
      EXPECT_EQ(whole.low[h], 1);
      EXPECT_EQ(whole.rows[h], 0);
      EXPECT_EQ(whole.outcome[h], FP_GUARD_WHOLE);
      EXPECT_EQ(whole.missed_block[h], -1);
    }
    EXPECT_EQ(whole.certificate[0], 1);
    const Geometry g = Geometry::Of(p, mask.view);
    const Sequence s = data.sequence(0);
    mask.Row(g.Row(s, 1, 2))[0] &= ~uint64_t{1 << 3}; // block 3 of tile 2, of head 1
    const GuardResults results = Audit(engine, p, mask, GuardOf(FP_GUARD_OBSERVE, 500, 1));
    EXPECT_EQ(results.outcome[0], FP_GUARD_WHOLE);
    EXPECT_EQ(results.rows[1], 128);
    EXPECT_EQ(results.missed_block[1], 3);
    EXPECT_EQ(results.outcome[1], FP_GUARD_LOW);
    double sum = 0;
    for (int64_t i = 256; i < 384; ++i) sum += RecallByHand(data, mask, s, i, 1);
    EXPECT_NEAR(results.recall[1], sum / 128, 1e-5);
    EXPECT_LT(results.recall[1], 1);
  }
}

// The engines against the reference: the same rows are drawn, so results agree but for rounding.
void CompareAudit(const OpData& data, const Mask& mask, int rows) {
  SCOPED_TRACE(data.op().Describe() + "; blocks of " + std::to_string(mask.view.block_size) +
               (mask.view.share_heads ? ", shared" : ""));
  Mask own = mask;
  const GuardResults expected = Audit(Reference(), data.problem(), own, GuardOf(FP_GUARD_OBSERVE, rows));
  for (const Engine& engine : OtherEngines()) {
    const GuardResults actual = Audit(engine, data.problem(), own, GuardOf(FP_GUARD_OBSERVE, rows));
    EXPECT_EQ(actual.rows, expected.rows) << engine.Name();
    for (size_t i = 0; i < actual.recall.size(); ++i) {
      EXPECT_NEAR(actual.recall[i], expected.recall[i], 1e-4) << engine.Name();
      EXPECT_NEAR(actual.low[i], expected.low[i], 1e-3) << engine.Name();
      EXPECT_NEAR(actual.p05[i], expected.p05[i], 1e-3) << engine.Name();
    }
  }
}

TEST(Guard, AgreesWithTheReference) {
  std::vector<OpCase> cases;
  for (const auto& list : {LengthCases(), HeadCases(), DtypeCases(), LayoutCases(), StrideCases(), PeakedCases()}) {
    cases.insert(cases.end(), list.begin(), list.end());
  }
  cases = Thinned(cases, 5);
  constexpr int kSizes[] = {64, 16, 128, 48, 32, 1024};
  for (size_t i = 0; i < cases.size(); ++i) {
    const OpData data(cases[i]);
    const Mask mask = RandomMask(data.problem(), kSizes[i % std::size(kSizes)], i % 3 == 1, false, 0.5, i);
    CompareAudit(data, mask, 7);
    if (data.problem().causal) CompareAudit(data, WithKeyLists(data.problem(), mask, 1 + i % 2, 60, 0.1, i), 7);
  }
}

TEST(Guard, SeesVerticalsAndSlashes) {
  const OpData data({.lengths = {{300, 420}, {200, 200}},
                     .kv_heads = 2,
                     .group = 2,
                     .q_layout = Layout::kPacked,
                     .k_layout = Layout::kPacked,
                     .values = Values::kStructured});
  const AnyPolicy policy = Parse(
      "minference(vertical=20, slash=40, rounding=tokens, sink_blocks=0, window_blocks=1, "
      "dense_tail_blocks=0)",
      32);
  const Mask mask = Select(Reference(), data.problem(), policy);
  CompareAudit(data, mask, 30);
  // The lists count: without them less is kept.
  Mask with = mask, without = mask;
  for (int b = 0; b < 2; ++b) {
    for (int h = 0; h < without.view.heads; ++h) {
      int32_t* at = VerticalSlashAt(without.view, b, h);
      at[0] = at[1] = 0;
    }
  }
  for (const Engine& engine : AllEngines()) {
    const fp_guard guard = GuardOf(FP_GUARD_OBSERVE, 30);
    const GuardResults a = Audit(engine, data.problem(), with, guard),
                       b = Audit(engine, data.problem(), without, guard);
    for (size_t i = 0; i < a.recall.size(); ++i) EXPECT_GT(a.recall[i], b.recall[i] + 1e-3) << engine.Name();
  }
}

TEST(Guard, SameSeedSameBits) {
  const OpData data({.lengths = {{700, 900}, {300, 300}},
                     .kv_heads = 2,
                     .group = 2,
                     .head_dim = 80,
                     .q_layout = Layout::kPacked,
                     .k_layout = Layout::kPacked});
  Mask mask = WithKeyLists(data.problem(), RandomMask(data.problem(), 48, false, false, 0.4, 1), 1, 100, 0.1, 2);
  for (const Engine& engine : AllEngines()) {
    const GuardResults one = Audit(engine, data.problem(), mask, GuardOf(FP_GUARD_OBSERVE, 45, 0.9f, 5), 1);
    const GuardResults four = Audit(engine, data.problem(), mask, GuardOf(FP_GUARD_OBSERVE, 45, 0.9f, 5), 4);
    EXPECT_EQ(one.recall, four.recall) << engine.Name();
    EXPECT_EQ(one.low, four.low);
    EXPECT_EQ(one.missed_block, four.missed_block);
    EXPECT_EQ(one.certificate, four.certificate);
    EXPECT_NE(one.recall, Audit(engine, data.problem(), mask, GuardOf(FP_GUARD_OBSERVE, 45, 0.9f, 6)).recall);
  }
}

TEST(Guard, NotANumberCountsForNothing) {
  OpData data({.lengths = {{200, 200}}});
  const Sequence s = data.sequence(0);
  data.SetKey(data.problem().k, s, 5, 0, 3, std::nanf(""));
  data.SetKey(data.problem().k, s, 150, 0, 0, INFINITY);
  data.SetQuery(s, 190, 0, 0, std::nanf("")); // sees no finite score at all
  CompareAudit(data, RandomMask(data.problem(), 16, false, false, 0.5, 3), 1000);
}

// ---------------------------------------------------------------- modes

OpData Peaked() {
  return OpData({.lengths = {{700, 700}, {200, 650}},
                 .kv_heads = 2,
                 .group = 2,
                 .q_layout = Layout::kPacked,
                 .k_layout = Layout::kPacked,
                 .values = Values::kStructured,
                 .seed = 3});
}

// What the policies of a list miss some of.
std::vector<AnyPolicy> Meagre() {
  std::vector<AnyPolicy> policies;
  for (const char* text :
       {"flashprefill(alpha=0.9)", "sketch(mass=0.3)", "sketch(gain=0.3)", "flexprefill(gamma=0.2, min_budget=0)",
        "xattention(threshold=0.2)", "xattention(head_thresholds=[0.1, 0.2, 0.3, 0.2])", "rrattention(threshold=0.2)",
        "spargeattn(cdf=0.3, similarity=-1)", "spargeattn(topk=0.2)", "prism(mass=0.3)",
        "sampleattention(coverage=0.3)", "gather(gain=0.3)", "gather(budget=0.05)",
        "sketch(mass=0.3, share_heads=true)"}) {
    policies.push_back(WithForced(Parse(text, 64), 0, 1, 0));
  }
  return Thinned(policies, 5);
}

TEST(Guard, ObservingChangesNothing) {
  const OpData data = Peaked();
  for (const AnyPolicy& policy : Meagre()) {
    SCOPED_TRACE(Name(policy));
    for (const Engine& engine : AllEngines()) {
      const Prefilled plain = Prefill(engine, data.problem(), policy);
      const Guarded guarded = PrefillGuarded(engine, data.problem(), policy, GuardOf(FP_GUARD_OBSERVE, 20));
      EXPECT_EQ(plain.mask.counts, guarded.prefilled.mask.counts) << engine.Name();
      EXPECT_EQ(plain.attended.out, guarded.prefilled.attended.out) << engine.Name();
      std::vector<float> levels(4, 2.0f);
      EXPECT_EQ(PrefillGuarded(engine, data.problem(), policy, GuardOf(FP_GUARD_OBSERVE, 20), levels).guard.levels,
                levels);
    }
  }
}

TEST(Guard, RepairsHeadsThatKeepTooLittle) {
  const OpData data = Peaked();
  const fp_problem& p = data.problem();
  for (const AnyPolicy& policy : Meagre()) {
    SCOPED_TRACE(Name(policy));
    for (const Engine& engine : AllEngines()) {
      const Prefilled plain = Prefill(engine, p, policy);
      const GuardResults before = PrefillGuarded(engine, p, policy, GuardOf(FP_GUARD_OBSERVE, 2000)).guard;
      // All rows are audited, so what is reported is exact.
      const Guarded guarded = PrefillGuarded(engine, p, policy, GuardOf(FP_GUARD_REPAIR, 2000));
      Mask mask = guarded.prefilled.mask;
      EXPECT_TRUE(Close(p, Attend(Reference(), p, mask), guarded.prefilled.attended)) << engine.Name();
      const GuardResults after = Audit(engine, p, mask, GuardOf(FP_GUARD_OBSERVE, 2000));
      bool repaired = false;
      for (size_t i = 0; i < after.recall.size(); ++i) {
        EXPECT_EQ(after.recall[i], guarded.guard.recall[i]);
        if (guarded.guard.outcome[i] != FP_GUARD_REPAIRED) continue;
        repaired = true;
        EXPECT_EQ(before.outcome[i], FP_GUARD_LOW);
        EXPECT_GT(after.recall[i], before.recall[i]) << engine.Name();
      }
      EXPECT_TRUE(repaired) << engine.Name();
      // A repair only adds, and counts say so.
      for (size_t w = 0; w < mask.bits.size(); ++w) EXPECT_EQ(plain.mask.bits[w] & ~mask.bits[w], 0u);
      const Geometry g = Geometry::Of(p, mask.view);
      for (int b = 0; b < p.batch; ++b) {
        const Sequence s = data.sequence(b);
        for (int64_t row = 0; row < g.Tiles(s) * g.mask_heads; ++row) {
          const int64_t at = g.Row(s, row / g.Tiles(s), row % g.Tiles(s));
          EXPECT_GE(mask.counts[at], plain.mask.counts[at]);
        }
      }
    }
  }
}

TEST(Guard, WhatHasNoBudgetBecomesDense) {
  const OpData data = Peaked();
  const fp_problem& p = data.problem();
  for (const char* text : {"streaming", "minference(vertical=10, slash=10, rounding=tokens)"}) {
    const AnyPolicy policy = WithForced(Parse(text, 64), 0, 1, 0);
    for (const Engine& engine : AllEngines()) {
      const Guarded guarded = PrefillGuarded(engine, p, policy, GuardOf(FP_GUARD_REPAIR, 30));
      for (size_t i = 0; i < guarded.guard.outcome.size(); ++i) {
        if (guarded.guard.outcome[i] == FP_GUARD_HELD || guarded.guard.outcome[i] == FP_GUARD_WHOLE) continue;
        EXPECT_EQ(guarded.guard.outcome[i], FP_GUARD_DENSE) << text;
        EXPECT_EQ(guarded.guard.recall[i], 1);
        EXPECT_EQ(guarded.guard.rows[i], 0);
      }
    }
  }
}

TEST(Guard, StrictHeadsKeepEverything) {
  const OpData data = Peaked();
  const fp_problem& p = data.problem();
  for (const AnyPolicy& policy : Meagre()) {
    for (const Engine& engine : AllEngines()) {
      const Guarded guarded = PrefillGuarded(engine, p, policy, GuardOf(FP_GUARD_STRICT, 25, 1));
      for (size_t i = 0; i < guarded.guard.outcome.size(); ++i) {
        EXPECT_EQ(guarded.guard.outcome[i], FP_GUARD_DENSE) << Name(policy);
        EXPECT_EQ(guarded.guard.recall[i], 1);
      }
      EXPECT_EQ(guarded.guard.certificate[0], 1);
      EXPECT_TRUE(Close(p, Attend(Reference(), p, Select(Reference(), p, Dense(64))), guarded.prefilled.attended));
    }
  }
}

TEST(Guard, LevelsRiseAndSink) {
  const OpData data = Peaked();
  const fp_problem& p = data.problem();
  const AnyPolicy policy = WithForced(Parse("sketch(gain=0.3)", 64), 0, 1, 0);
  for (const Engine& engine : AllEngines()) {
    const Guarded first = PrefillGuarded(engine, p, policy, GuardOf(FP_GUARD_REPAIR, 20, 1), {0, 0, 0.5f, 4});
    EXPECT_EQ(first.guard.levels, (std::vector<float>{1, 1, 1.5f, 4}));
    const Guarded held = PrefillGuarded(engine, p, policy, GuardOf(FP_GUARD_REPAIR, 20, 1e-6f), {0, 0.1f, 1, 4});
    if (held.guard.outcome[0] == FP_GUARD_HELD) {
      EXPECT_NEAR(held.guard.levels[2], 0.9f, 1e-6);
      EXPECT_EQ(held.guard.levels[1], 0);
    }
    // A level is a larger budget from the start. No row keeps less than half here, so nothing is repaired.
    const OpData even({.lengths = {{500, 500}, {300, 600}},
                       .kv_heads = 2,
                       .group = 2,
                       .q_layout = Layout::kPacked,
                       .k_layout = Layout::kPacked});
    const AnyPolicy some = WithForced(Parse("sketch(mass=0.8)", 16), 0, 1, 0);
    const Guarded higher =
        PrefillGuarded(engine, even.problem(), some, GuardOf(FP_GUARD_STRICT, 2000, 1e-6f), {2, 2, 2, 2});
    const Guarded lower =
        PrefillGuarded(engine, even.problem(), some, GuardOf(FP_GUARD_STRICT, 2000, 1e-6f), {0, 0, 0, 0});
    for (size_t i = 0; i < 8; ++i) {
      EXPECT_EQ(lower.guard.outcome[i], FP_GUARD_HELD);
      EXPECT_GE(higher.guard.recall[i], lower.guard.recall[i]);
    }
    EXPECT_GT(higher.guard.recall[0], lower.guard.recall[0]);
    EXPECT_NEAR(higher.guard.levels[0], 1.8f, 1e-6);
  }
}

// A head that is selected for by itself still has its own scale.
TEST(Guard, HeadsOfAnFp8CacheKeepTheirScales) {
  OpCase op;
  op.lengths = {{500, 700}};
  op.kv_heads = 7;
  op.q_layout = op.k_layout = Layout::kPacked;
  op.softmax_scale = 0.2f;
  op.Dtypes(FP_BF16, FP_E4M3, FP_E4M3).scales = 3; // from 0.5 of the first head to 1.28 of the last
  const OpData data(op);
  for (const Engine& engine : AllEngines()) {
    const Guarded guarded = PrefillGuarded(engine, data.problem(), Parse("sketch(gain=0.12)", 32),
                                           GuardOf(FP_GUARD_STRICT, 2000, 1e-6f), std::vector<float>(7, 1));
    for (const int32_t outcome : guarded.guard.outcome) ASSERT_LE(outcome, FP_GUARD_HELD);
    const Mask larger = Select(engine, data.problem(), Parse("sketch(gain=0.03)", 32));
    EXPECT_TRUE(SameMask(data.problem(), larger, guarded.prefilled.mask)) << engine.Name();
  }
}

TEST(Guard, EveryMethodFitsAndSaysWhatItsBudgetIs) {
  for (const MethodName& name : AllMethods()) {
    const AnyPolicy policy = Parse(name.name);
    ASSERT_LE(policy.get()->struct_size, kMostPolicyBytes);
    alignas(8) std::byte bytes[kMostPolicyBytes];
    std::vector<int32_t> tables(64);
    const bool has = WithBudget(*policy.get(), 0, 4, 4, reinterpret_cast<Policy&>(bytes), tables.data());
    const std::set<std::string> without = {"dense", "streaming", "minference", "vsprefill"};
    EXPECT_EQ(has, without.count(name.name) == 0) << name.name;
    ValidatePolicyAlone(reinterpret_cast<const Policy*>(bytes));
  }
}

// ---------------------------------------------------------------- refusals

TEST(Guard, BadGuardsAreRefused) {
  const OpData data({});
  const fp_problem& p = data.problem();
  const AnyPolicy policy = Parse("sketch");
  Mask mask(p, policy.get());
  const auto refusal = [&](const auto& change) {
    fp_guard guard = GuardOf(FP_GUARD_OBSERVE, 0);
    float level = 0;
    guard.levels = &level;
    change(guard, level);
    fp_exec exec;
    fp_exec_init(&exec);
    exec.guard = &guard;
    size_t bytes;
    return fp_prefill_workspace(&p, policy.get(), &exec, &bytes) == FP_OK ? "" : fp_last_error();
  };
  EXPECT_STREQ(refusal([](fp_guard&, float&) {}), "");
  EXPECT_STREQ(refusal([](fp_guard& g, float&) { g.mode = 3; }), "guard.mode is 3; it must be from 0 to 2");
  EXPECT_STREQ(refusal([](fp_guard& g, float&) { g.target = 0; }),
               "guard.target is 0; it must be above 0 and at most 1");
  EXPECT_STREQ(refusal([](fp_guard& g, float&) { g.risk = 1; }), "guard.risk is 1; it must be above 0 and below 1");
  EXPECT_STREQ(refusal([](fp_guard& g, float&) { g.rows = -1; }), "guard.rows is -1; it must be from 0 to 2147483647");
  EXPECT_STREQ(refusal([](fp_guard&, float& l) { l = std::nanf(""); }),
               "guard.levels[0] is nan; it must be from 0 to 16");
  fp_exec exec;
  fp_exec_init(&exec);
  size_t bytes;
  EXPECT_EQ(fp_audit_workspace(&p, &mask.view, &exec, &bytes), FP_INVALID_ARGUMENT);
  EXPECT_STREQ(fp_last_error(), "exec.guard is NULL; it must be the guard to audit by");
  fp_guard guard = GuardOf(FP_GUARD_OBSERVE, 0);
  exec.guard = &guard;
  EXPECT_EQ(fp_select(&p, policy.get(), &exec, &mask.view, nullptr, 0), FP_INVALID_ARGUMENT);
  EXPECT_STREQ(fp_last_error(), "exec.guard is given; it must be NULL for fp_select: fp_prefill and fp_audit take one");
}

} // namespace
} // namespace flashprefill::test
