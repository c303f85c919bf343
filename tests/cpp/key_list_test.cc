// Attention over masks with key lists: outputs of each CPU backend and instruction set against the reference's on
// random lists, properties of lists, and lists that are refused. And the threshold of keys against a sort.
#include "core/key_list.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <random>

#include "cases.h"
#include "compare.h"
#include "cpu/key_threshold.h"
#include "engine.h"

namespace flashprefill::test {
namespace {

void CompareAttend(const OpData& data, const Mask& mask) {
  SCOPED_TRACE(data.op().Describe() + "; segments of " + std::to_string(mask.view.segment_tiles) + " tiles" +
               (mask.view.share_heads ? ", shared" : "") + ", correction " + std::to_string(mask.view.mean_correction));
  const Attended expected = Attend(Reference(), data.problem(), mask);
  for (const Engine& engine : OtherEngines()) {
    EXPECT_TRUE(Close(data.problem(), expected, Attend(engine, data.problem(), mask, 2, data.op().out_strides)))
        << engine.Name();
  }
}

void AttendOver(std::vector<OpCase> cases) {
  cases = Thinned(cases);
  std::erase_if(cases, [](const OpCase& op) { return !op.causal; });
  for (size_t i = 0; i < cases.size(); ++i) {
    const OpData data(cases[i]);
    const fp_problem& p = data.problem();
    const int room = static_cast<int>(std::max<int64_t>(1, p.max_seqlen_k));
    const Mask blocks = RandomMask(p, i % 2 ? 64 : 16, false, i % 3 == 0, 0.2, i);
    CompareAttend(data, WithKeyLists(p, blocks, 1 + static_cast<int>(i % 3), room, 0.3, i));
    const Mask summarised = RandomMask(p, 16, i % 2, FP_SUMMARY_KEYS, 0.2, i);
    CompareAttend(data, WithKeyLists(p, summarised, 1 + static_cast<int>(i % 3), room, 0.3, i));
    const Mask shared = RandomMask(p, i % 2 ? 128 : 48, true, i % 3 != 0, 0.1, i + 1000);
    CompareAttend(data, WithKeyLists(p, shared, 1 + static_cast<int>(i % 4), std::max(1, room / 2), 0.6, i + 1000));
  }
}

TEST(KeyLists, Lengths) { AttendOver(LengthCases()); }
TEST(KeyLists, Heads) { AttendOver(HeadCases()); }
TEST(KeyLists, Dtypes) { AttendOver(DtypeCases()); }
TEST(KeyLists, Layouts) { AttendOver(LayoutCases()); }
TEST(KeyLists, Strides) { AttendOver(StrideCases()); }
TEST(KeyLists, Peaked) { AttendOver(PeakedCases()); }

OpCase Packed() {
  OpCase op;
  op.lengths = {{300, 500}, {200, 200}, {0, 40}, {2, 333}};
  op.q_layout = op.k_layout = Layout::kPacked;
  op.kv_heads = 2, op.group = 3, op.head_dim = 40;
  return op;
}

TEST(KeyLists, EmptyListsAreNoLists) {
  const OpData data(Packed());
  const fp_problem& p = data.problem();
  for (const bool shared : {false, true}) {
    const Mask blocks = RandomMask(p, 64, shared, false, 0.4, 3);
    for (const Engine& engine : AllEngines()) {
      EXPECT_TRUE(SameBits(p, Attend(engine, p, blocks), Attend(engine, p, WithKeyLists(p, blocks, 2, 9, 0, 1))));
    }
  }
}

// All keys in lists and no block at all: dense attention. And all keys in both: each counts once.
TEST(KeyLists, AListOfAllKeysIsDense) {
  const OpData data(Packed());
  const fp_problem& p = data.problem();
  for (const bool shared : {false, true}) {
    const Mask all = RandomMask(p, 64, shared, false, 1, 1), none = RandomMask(p, 64, shared, false, 0, 1);
    const Attended dense = Attend(Reference(), p, all);
    for (const Engine& engine : AllEngines()) {
      EXPECT_TRUE(Close(p, dense, Attend(engine, p, WithKeyLists(p, none, 2, 500, 1, 1)))) << engine.Name();
      EXPECT_TRUE(Close(p, dense, Attend(engine, p, WithKeyLists(p, all, 2, 500, 1, 1)))) << engine.Name();
    }
  }
}

// Lists may hold keys of the future; rows see none of them.
TEST(KeyLists, RowsNeverDependOnTheFuture) {
  const OpCase op = Packed();
  const OpData before(op);
  const fp_problem& p = before.problem();
  for (const bool shared : {false, true}) {
    const Mask mask = WithKeyLists(p, RandomMask(p, 32, shared, false, 0.2, 5), 2, 500, 0.5, 5);
    for (const Engine& engine : AllEngines()) {
      const Attended want = Attend(engine, p, mask);
      for (const int64_t from : {1, 37, 130}) { // tokens before the end that change
        OpData after(op);
        for (int b = 0; b < p.batch; ++b) {
          const Sequence s = after.sequence(b);
          for (int64_t t = std::max<int64_t>(0, s.k_len - from); t < s.k_len; ++t) {
            for (int64_t x = 0; x < int64_t{p.kv_heads} * p.head_dim; ++x) {
              after.SetKey(after.problem().k, s, t, x / p.head_dim, x % p.head_dim, x % 2 ? NAN : 1e4f);
              after.SetKey(after.problem().v, s, t, x / p.head_dim, x % p.head_dim, -6e4f);
            }
          }
        }
        const Attended have = Attend(engine, after.problem(), mask);
        int64_t changed = 0, rows = 0;
        for (int b = 0; b < p.batch; ++b) {
          const Sequence s = before.sequence(b);
          for (int64_t i = 0; i < s.q_len && s.prefix + i < s.k_len - from; ++i) {
            for (int h = 0; h < p.q_heads; ++h, ++rows) {
              const int64_t r = LogicalRow(p, s, i, h);
              changed += std::bit_cast<uint32_t>(want.lse[r]) != std::bit_cast<uint32_t>(have.lse[r]);
              for (int64_t x = r * p.head_dim; x < (r + 1) * p.head_dim; ++x) {
                changed += std::bit_cast<uint32_t>(want.out[x]) != std::bit_cast<uint32_t>(have.out[x]);
              }
            }
          }
        }
        EXPECT_GT(rows, 0);
        EXPECT_EQ(changed, 0) << engine.Name() << ", the last " << from;
      }
    }
  }
}

TEST(KeyLists, SameBitsWhateverTheThreads) {
  const OpData data(Packed());
  const fp_problem& p = data.problem();
  const Mask mask = WithKeyLists(p, RandomMask(p, 32, true, false, 0.2, 5), 2, 500, 0.5, 5);
  for (const Engine& engine : OtherEngines()) {
    EXPECT_TRUE(SameBits(p, Attend(engine, p, mask, 1), Attend(engine, p, mask, 5))) << engine.Name();
  }
}

// NaN in keys and values that are neither in a kept block nor in a list reach no row.
TEST(KeyLists, GarbageStaysWhereItIs) {
  const OpCase op = Packed();
  const OpData clean(op);
  OpData dirty(op);
  const fp_problem& p = clean.problem();
  const Mask mask = WithKeyLists(p, RandomMask(p, 64, true, false, 0, 5), 4, 500, 0.4, 5);
  for (int b = 0; b < p.batch; ++b) {
    const Sequence s = clean.sequence(b);
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      std::vector<uint8_t> listed(static_cast<size_t>(s.k_len));
      for (int64_t i = 0; i < Segments(mask.view, s); ++i) {
        for (const int32_t key : mask.Keys(s, h, i)) listed[key] = 1;
      }
      for (int64_t t = 0; t < s.k_len; ++t) {
        if (!listed[t]) {
          dirty.SetKey(dirty.problem().k, s, t, h, 0, NAN);
          dirty.SetKey(dirty.problem().v, s, t, h, 1, std::numeric_limits<float>::infinity());
        }
      }
    }
  }
  for (const Engine& engine : AllEngines()) {
    EXPECT_TRUE(SameBits(p, Attend(engine, p, mask), Attend(engine, dirty.problem(), mask))) << engine.Name();
  }
}

// ---------------------------------------------------------------- refusals

struct Refused {
  std::function<void(Mask&, int32_t* list)> breaks; // the list of the first head's first segment: keys 0 .. 9 of 12
  const char* says;
};

TEST(KeyLists, BadListsAreRefused) {
  OpCase op;
  op.lengths = {{20, 30}};
  const OpData data(op);
  const Refused all[] = {
      {[](Mask&, int32_t* list) { list[0] = -1; }, "mask.key_lists[0][0][0] is -1; it must be from 0 to 12"},
      {[](Mask&, int32_t* list) { list[0] = 13; }, "mask.key_lists[0][0][0] is 13"},
      {[](Mask&, int32_t* list) { list[1] = 9; }, "mask.key_lists[0][0][1] is 9; it must be at least"},
      {[](Mask&, int32_t* list) { list[2] = -5; }, "mask.key_lists[0][0]'s key 0 is -5; it must be above"},
      {[](Mask&, int32_t* list) { list[6] = list[5]; }, "mask.key_lists[0][0]'s key 4 is 3"},
      {[](Mask&, int32_t* list) { list[11] = 30; }, "mask.key_lists[0][0]'s key 9 is 30; it must be"},
      {[](Mask& m, int32_t*) { m.view.key_lists = nullptr; }, "mask.key_lists is NULL"},
      {[](Mask& m, int32_t*) { m.view.segment_tiles = 0; }, "mask.segment_tiles is 0"},
      {[](Mask& m, int32_t*) { m.view.segment_rows += 1; }, "mask.segment_rows is 2; it must be 1"},
  };
  for (const Refused& refused : all) {
    Mask mask = WithKeyLists(data.problem(), RandomMask(data.problem(), 16, false, false, 1, 1), 1, 12, 0, 1);
    int32_t* list = mask.key_lists.data();
    list[0] = list[1] = 10;
    for (int i = 0; i < 10; ++i) list[2 + i] = i;
    size_t bytes = 0;
    ASSERT_EQ(fp_attend_workspace(&data.problem(), &mask.view, nullptr, &bytes), FP_OK) << fp_last_error();
    std::vector<std::byte> memory(bytes + 64);
    void* workspace = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
    std::vector<float> out(20 * 64, 7);
    fp_output output;
    fp_output_init(&output);
    output.out = data.problem().q;
    output.out.data = out.data();
    refused.breaks(mask, list);
    EXPECT_EQ(fp_attend(&data.problem(), &mask.view, nullptr, &output, workspace, bytes), FP_INVALID_ARGUMENT);
    EXPECT_NE(std::string(fp_last_error()).find(refused.says), std::string::npos) << fp_last_error();
    EXPECT_EQ(out, std::vector<float>(20 * 64, 7));
  }
}

// ---------------------------------------------------------------- the threshold

struct Sorted {
  std::vector<int32_t> keys; // kept
  int64_t wanted;
};

Sorted BySorting(const std::vector<float>& energies, const cpu::KeyRule& rule) {
  std::vector<int32_t> order(energies.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return energies[a] > energies[b]; });
  size_t wanted = static_cast<size_t>(rule.count);
  if (!std::isnan(rule.gain)) {
    double rest = 0;
    for (wanted = order.size(); wanted > 0; --wanted) {
      const double energy = energies[order[wanted - 1]];
      rest += energy;
      if (energy * std::sqrt(rest) >= rule.gain) break;
    }
  }
  order.resize(std::min({wanted, order.size(), static_cast<size_t>(rule.room)}));
  std::sort(order.begin(), order.end());
  return {order, static_cast<int64_t>(wanted)};
}

// With `sift`, keys that cannot have the gain are taken out before and count by their sum.
Sorted ByThreshold(const std::vector<float>& energies, cpu::KeyRule rule, bool sift) {
  const double total = std::accumulate(energies.begin(), energies.end(), 0.0);
  const double least = sift && total > 0 && !std::isnan(rule.gain) ? 0.999 * rule.gain / std::sqrt(total) : 0;
  std::vector<float> left;
  std::vector<int32_t> keys;
  for (size_t i = 0; i < energies.size(); ++i) {
    if (energies[i] < least) {
      rule.below += double{energies[i]};
    } else {
      left.push_back(energies[i]), keys.push_back(static_cast<int32_t>(i));
    }
  }
  const int64_t n = static_cast<int64_t>(left.size());
  std::vector<uint64_t> ranks(left.size());
  const cpu::KeyThreshold threshold = cpu::FindKeyThreshold(left.data(), n, rule, ranks.data());
  Sorted found{std::vector<int32_t>(static_cast<size_t>(threshold.kept)), threshold.wanted};
  cpu::TakeKeys(left.data(), keys.data(), n, threshold, found.keys.data());
  return found;
}

TEST(KeyThreshold, FindsWhatASortFinds) {
  std::mt19937 random(7);
  for (const int n : {1, 2, 63, 64, 65, 1000, 4097}) {
    for (int kind = 0; kind < 5; ++kind) {
      std::vector<float> energies(static_cast<size_t>(n));
      for (float& e : energies) {
        const float x = static_cast<float>(random() % 1000) / 1000;
        e = kind == 0   ? x / static_cast<float>(n)
            : kind == 1 ? std::exp2(-60 * x)
            : kind == 2 ? static_cast<float>(random() % 3) / 4 // many equal ones, and zeros
            : kind == 3 ? 0.25f
                        : 0.f;
      }
      std::vector<cpu::KeyRule> rules;
      for (const int64_t count : {0, 1, n / 3, n - 1, n}) {
        for (const int64_t room : {0, 1, n / 2, n}) rules.push_back({.count = count, .room = room});
      }
      for (const double gain : {1e-30, 1e-9, 1e-4, 1e-2, 0.3, 2.0, 100.0}) {
        for (const int64_t room : {n / 2, n}) rules.push_back({.gain = gain, .room = room});
      }
      for (const cpu::KeyRule& rule : rules) {
        const Sorted want = BySorting(energies, rule);
        for (const bool sift : {false, true}) {
          const Sorted have = ByThreshold(energies, rule, sift);
          ASSERT_EQ(have.wanted, want.wanted) << n << ", " << kind << ", " << rule.gain << ", " << sift;
          ASSERT_EQ(have.keys, want.keys) << n << ", " << kind << ", " << rule.gain << ", " << rule.count;
        }
      }
    }
  }
}

} // namespace
} // namespace flashprefill::test
