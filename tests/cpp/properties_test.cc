// Properties of every backend, the reference included, for any numbers: exactness with all blocks kept, causality bit
// for bit, one answer for any number of threads and any order of pages, and that garbage stays where it is.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "cases.h"
#include "compare.h"
#include "engine.h"
#include "method_suite.h"

namespace flashprefill::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Softmax attention over all that a row may see, as a textbook writes it.
Attended DenseAttention(const OpData& data) {
  const fp_problem& p = data.problem();
  Attended result;
  for (int b = 0; b < p.batch; ++b) {
    const Sequence s = data.sequence(b);
    for (int64_t i = 0; i < s.q_len; ++i) {
      for (int64_t h = 0; h < p.q_heads; ++h) {
        const int64_t kv = h / (p.q_heads / p.kv_heads);
        const int64_t seen = p.causal ? s.k_len - s.q_len + i + 1 : s.k_len;
        std::vector<double> out(static_cast<size_t>(p.head_dim));
        std::vector<float> q;
        for (int64_t d = 0; d < p.head_dim; ++d) q.push_back(data.Query(s, i, h, d));
        double sum = 0;
        for (int64_t t = 0; t < seen; ++t) {
          double z = 0;
          for (int64_t d = 0; d < p.head_dim; ++d) z += double{q[d]} * data.Key(p.k, s, t, kv, d);
          const double weight = std::exp(p.softmax_scale * z); // scores of these tests stay far below 700
          sum += weight;
          for (int64_t d = 0; d < p.head_dim; ++d) out[d] += weight * data.Key(p.v, s, t, kv, d);
        }
        for (const double x : out) result.out.push_back(sum > 0 ? static_cast<float>(x / sum) : 0.0f);
        result.lse.push_back(static_cast<float>(std::log(sum)));
      }
    }
  }
  return result;
}

std::vector<Mask> MixedMasks(const fp_problem& p) {
  return Thinned<Mask>({RandomMask(p, 64, false, false, 0.6, 1), RandomMask(p, 128, true, true, 0.6, 2),
                        RandomMask(p, 32, false, true, 0.4, 3)},
                       2);
}

template <typename Body>
void ForAllEngines(const OpCase& op, const Body& body) {
  const OpData data(op);
  for (const Engine& engine : AllEngines()) {
    SCOPED_TRACE(engine.Name() + ": " + op.Describe());
    body(engine, data);
  }
}

TEST(Properties, AllBlocksKeptIsDenseAttention) {
  std::vector<OpCase> cases = MixedCases();
  OpCase open;
  open.lengths = {{70, 30}, {70, 0}, {70, 130}};
  open.k_layout = Layout::kPacked;
  open.causal = false;
  cases.push_back(open);
  for (const OpCase& op : Thinned(cases, 3)) {
    const Attended expected = DenseAttention(OpData(op));
    ForAllEngines(op, [&](const Engine& engine, const OpData& data) {
      const fp_problem& p = data.problem();
      EXPECT_TRUE(Close(p, expected, Prefill(engine, p, Dense(64)).attended));
      EXPECT_TRUE(Close(p, expected, Prefill(engine, p, Corrected(Shared(Dense(128)))).attended));
      EXPECT_TRUE(Close(p, expected, Attend(engine, p, RandomMask(p, 16, false, true, 1.0, 1))));
    });
  }
}

TEST(Properties, AlphaZeroIsDense) {
  for (const OpCase& op : Thinned(MixedCases(), 3)) {
    ForAllEngines(op, [](const Engine& engine, const OpData& data) {
      const fp_problem& p = data.problem();
      for (const char* text : {"flashprefill(alpha=0)", "flashprefill(alpha=0, query_pool=16)",
                               "sketch(alpha=0, query_pool=1)", "sketch(alpha=0)"}) {
        for (const bool shared : {false, true}) {
          AnyPolicy policy = WithForced(Parse(text, 32), 0, 0, 0), dense = Dense(32);
          policy.common.share_heads = dense.common.share_heads = shared;
          const Prefilled have = Prefill(engine, p, policy), want = Prefill(engine, p, dense);
          Mask same_reason = want.mask;
          same_reason.fallback = have.mask.fallback;
          EXPECT_TRUE(SameMask(p, same_reason, have.mask)) << Name(policy);
          EXPECT_TRUE(SameBits(p, want.attended, have.attended)) << Name(policy);
        }
      }
    });
  }
}

// The rows of tokens that stand before position t of sequence s must be the same bits in both.
void ExpectSameBefore(const fp_problem& p, const Sequence& s, int64_t t, const Attended& want, const Attended& have) {
  const int64_t rows = std::clamp<int64_t>(t - s.prefix, 0, s.q_len) * p.q_heads;
  const int64_t first = LogicalRow(p, s, 0, 0);
  int64_t changed = 0;
  for (int64_t r = first; r < first + rows; ++r) {
    changed += std::bit_cast<uint32_t>(want.lse[r]) != std::bit_cast<uint32_t>(have.lse[r]);
    for (int64_t x = r * p.head_dim; x < (r + 1) * p.head_dim; ++x) {
      changed += std::bit_cast<uint32_t>(want.out[x]) != std::bit_cast<uint32_t>(have.out[x]);
    }
  }
  EXPECT_EQ(changed, 0) << "values of rows before position " << t << " of sequence " << s.index;
}

TEST(Properties, RowsNeverDependOnTheFuture) {
  for (const OpCase& op : Thinned(MixedCases(), 3)) {
    const OpData before(op);
    const fp_problem& p = before.problem();
    const std::vector<Mask> masks = MixedMasks(p);
    for (const Engine& engine : AllEngines()) {
      SCOPED_TRACE(engine.Name() + ": " + op.Describe());
      std::vector<Attended> want;
      for (const Mask& mask : masks) want.push_back(Attend(engine, p, mask));
      for (const int64_t from :
           Thinned<int64_t>({37, 1, 64, 100, 101})) { // tokens before the end that change, of each sequence
        OpData after(op);
        std::mt19937 random(static_cast<unsigned>(from));
        const float keys[] = {NAN, kInf, -kInf, 6e4f, 0.0f};
        const float values[] = {6e4f, -6e4f, 1e-7f, 0.0f};
        for (int b = 0; b < p.batch; ++b) {
          const Sequence s = after.sequence(b);
          for (int64_t t = std::max<int64_t>(0, s.k_len - from); t < s.k_len; ++t) {
            for (int h = 0; h < p.kv_heads; ++h) {
              for (int d = 0; d < p.head_dim; ++d) {
                after.SetKey(after.problem().k, s, t, h, d, keys[random() % 5]);
                after.SetKey(after.problem().v, s, t, h, d, values[random() % 4]);
              }
            }
          }
        }
        for (size_t m = 0; m < masks.size(); ++m) {
          const Attended have = Attend(engine, after.problem(), masks[m]);
          for (int b = 0; b < p.batch; ++b) {
            const Sequence s = after.sequence(b);
            ExpectSameBefore(p, s, s.k_len - from, want[m], have);
          }
        }
      }
    }
  }
}

TEST(Properties, SelectThenAttendIsPrefill) {
  for (const OpCase& op : Thinned(MixedCases(), 3)) {
    ForAllEngines(op, [](const Engine& engine, const OpData& data) {
      const fp_problem& p = data.problem();
      for (const AnyPolicy& policy : MixedPolicies(data.problem().q_heads)) {
        const Mask mask = Select(engine, p, policy);
        const Attended attended = Attend(engine, p, mask);
        const Prefilled both = Prefill(engine, p, policy);
        EXPECT_TRUE(SameMask(p, mask, both.mask)) << Name(policy);
        EXPECT_TRUE(SameBits(p, attended, both.attended)) << Name(policy);
        EXPECT_TRUE(SameBits(p, attended, PrefillWithoutMask(engine, p, policy))) << Name(policy);
        const Prefilled counted = PrefillWithCounts(engine, p, policy);
        EXPECT_TRUE(SameBits(p, attended, counted.attended)) << Name(policy);
        EXPECT_EQ(mask.counts, counted.mask.counts) << Name(policy);
        EXPECT_EQ(mask.fallback, counted.mask.fallback) << Name(policy);
      }
    });
  }
}

TEST(Properties, TheNumberOfThreadsChangesNothing) {
  for (const OpCase& op : Thinned(MixedCases(), 3)) {
    ForAllEngines(op, [](const Engine& engine, const OpData& data) {
      const fp_problem& p = data.problem();
      for (const AnyPolicy& policy : MixedPolicies(data.problem().q_heads)) {
        const Prefilled one = Prefill(engine, p, policy, 1);
        for (const int threads : Thinned<int>({2, 3, 0})) {
          const Prefilled more = Prefill(engine, p, policy, threads);
          EXPECT_TRUE(SameMask(p, one.mask, more.mask)) << Name(policy) << ", threads " << threads;
          EXPECT_TRUE(SameBits(p, one.attended, more.attended)) << Name(policy) << ", threads " << threads;
        }
      }
    });
  }
}

TEST(Properties, TheOrderOfPagesChangesNothing) {
  for (const int page_size : Thinned<int>({16, 1, 64, 128})) {
    OpCase op;
    op.lengths = {{140, 333}, {65, 65}, {1, 200}};
    op.q_layout = Layout::kPacked;
    op.k_layout = Layout::kPaged;
    op.page_size = page_size;
    op.kv_heads = 2;
    op.group = 2;
    op.AllDtypes(page_size == 16 ? FP_F32 : FP_BF16);
    OpCase other = op;
    other.page_seed = 99;
    const OpData shuffled(other);
    ForAllEngines(op, [&](const Engine& engine, const OpData& data) {
      for (const AnyPolicy& policy : MixedPolicies(data.problem().q_heads)) {
        const Prefilled want = Prefill(engine, data.problem(), policy);
        const Prefilled have = Prefill(engine, shuffled.problem(), policy);
        EXPECT_TRUE(SameMask(data.problem(), want.mask, have.mask)) << Name(policy);
        EXPECT_TRUE(SameBits(data.problem(), want.attended, have.attended)) << Name(policy);
      }
    });
  }
}

// Tiles of `mask` that belong to tokens [begin, end) of the one sequence of `whole`, as the mask of the chunk's
// problem.
Mask ChunkMask(const fp_problem& chunk, const Mask& whole, int64_t begin) {
  AnyPolicy policy = Dense(whole.view.block_size);
  policy.common.share_heads = whole.view.share_heads;
  policy.common.mean_correction = whole.view.mean_correction;
  Mask mask(chunk, policy.get());
  const int64_t tiles = DivUp<int64_t>(chunk.total_q, whole.view.tile_tokens);
  for (int64_t h = 0; h < whole.view.heads; ++h) {
    for (int64_t m = 0; m < tiles; ++m) {
      const uint64_t* from = whole.Row(h * whole.view.tile_rows + begin / whole.view.tile_tokens + m);
      std::copy(from, from + mask.view.words, mask.Row(h * mask.view.tile_rows + m));
    }
  }
  return mask;
}

TEST(Properties, ChunksUnderOneMaskAreTheWhole) {
  for (const int32_t dtype : Thinned<int32_t>({FP_F32, FP_BF16})) {
    OpCase op;
    op.lengths = {{700, 700}};
    op.kv_heads = 2;
    op.group = 2;
    op.AllDtypes(dtype);
    ForAllEngines(op, [](const Engine& engine, const OpData& data) {
      const fp_problem& p = data.problem();
      for (const Mask& mask : MixedMasks(p)) {
        const Attended whole = Attend(engine, p, mask);
        Attended parts;
        for (const auto& [begin, end] : {std::pair{0, 256}, {256, 384}, {384, 700}}) {
          fp_problem chunk = p;
          chunk.q.data = static_cast<char*>(p.q.data) + begin * p.q.stride[1] * int64_t(DtypeSize(p.q.dtype));
          chunk.max_seqlen_q = chunk.total_q = end - begin;
          chunk.max_seqlen_k = end;
          const Attended part = Attend(engine, chunk, ChunkMask(chunk, mask, begin));
          parts.out.insert(parts.out.end(), part.out.begin(), part.out.end());
          parts.lse.insert(parts.lse.end(), part.lse.begin(), part.lse.end());
        }
        EXPECT_TRUE(Close(p, whole, parts));
      }
    });
  }
}

TEST(Properties, RowsThatSeeNothingAreZeroAndMinusInfinity) {
  OpCase open;
  open.lengths = {{70, 0}, {70, 90}};
  open.k_layout = Layout::kPacked;
  open.causal = false;
  std::vector<OpCase> cases = MixedCases();
  cases.push_back(open);
  for (const OpCase& op : Thinned(cases, 5)) {
    ForAllEngines(op, [](const Engine& engine, const OpData& data) {
      const fp_problem& p = data.problem();
      for (const bool shared : {false, true}) {
        const Attended nothing = Attend(engine, p, RandomMask(p, 64, shared, false, 0.0, 1));
        for (const float x : nothing.out) ASSERT_EQ(std::bit_cast<uint32_t>(x), 0u);
        for (const float x : nothing.lse) ASSERT_EQ(x, -kInf);
      }
      if (p.causal) return;
      const Attended some = Attend(engine, p, RandomMask(p, 64, false, true, 1.0, 1));
      const int64_t rows = data.sequence(0).q_len * p.q_heads; // of the sequence without keys
      for (int64_t x = 0; x < rows * p.head_dim; ++x) ASSERT_EQ(some.out[x], 0);
      for (int64_t r = 0; r < rows; ++r) ASSERT_EQ(some.lse[r], -kInf);
      for (size_t r = static_cast<size_t>(rows); r < some.lse.size(); ++r) ASSERT_TRUE(std::isfinite(some.lse[r]));
    });
  }
}

TEST(Properties, AttendIgnoresBitsOfBlocksThatNoRowSees) {
  for (const OpCase& op : Thinned(MixedCases())) {
    ForAllEngines(op, [](const Engine& engine, const OpData& data) {
      const fp_problem& p = data.problem();
      for (const Mask& mask : MixedMasks(p)) {
        const Geometry g = Geometry::Of(p, mask.view);
        Mask clean = mask;
        for (int b = 0; b < p.batch; ++b) {
          const Sequence s = data.sequence(b);
          for (int64_t m = 0; m < g.Tiles(s); ++m) {
            for (int64_t h = 0; h < g.mask_heads; ++h) {
              uint64_t* row = clean.Row(g.Row(s, h, m));
              for (int64_t w = 0; w < g.words; ++w) row[w] = VisibleWord(row, w, g.TileOf(p, s, m).visible);
            }
          }
        }
        EXPECT_TRUE(SameBits(p, Attend(engine, p, mask), Attend(engine, p, clean)));
      }
    });
  }
}

TEST(Properties, LseIsOptional) {
  ForAllEngines(MixedCases()[2], [](const Engine& engine, const OpData& data) {
    const fp_problem& p = data.problem();
    for (const Mask& mask : MixedMasks(p)) {
      const Attended with = Attend(engine, p, mask);
      const Attended without = Attend(engine, p, mask, 2, Strides::kContiguous, false);
      EXPECT_TRUE(without.lse.empty());
      EXPECT_EQ(std::memcmp(with.out.data(), without.out.data(), with.out.size() * 4), 0);
    }
  });
}

// NaN in the keys and values of blocks that no row keeps, in one query row, and in another sequence: only that row and
// that sequence may change.
TEST(Properties, GarbageStaysWhereItIs) {
  for (const OpCase& op : Thinned(MixedCases(), 3)) {
    const OpData clean(op);
    OpData dirty(op);
    const fp_problem& p = clean.problem();
    const int block_size = 32;
    Mask mask = RandomMask(p, block_size, false, false, 1.0, 1);
    for (size_t w = 0; w < mask.bits.size(); ++w) mask.bits[w] = 0xb6db6db6db6db6dbu; // every third block is left out
    const int other = p.batch > 1 ? 1 : -1;
    for (int b = 0; b < p.batch; ++b) {
      const Sequence s = clean.sequence(b);
      for (int64_t t = 0; t < s.k_len; ++t) {
        if (b != other && TestBit(mask.Row(0), t / block_size)) continue;
        for (int h = 0; h < p.kv_heads; ++h) {
          for (int d = 0; d < p.head_dim; ++d) {
            dirty.SetKey(dirty.problem().k, s, t, h, d, NAN);
            dirty.SetKey(dirty.problem().v, s, t, h, d, t % 2 ? NAN : kInf);
          }
        }
      }
    }
    const Sequence s0 = clean.sequence(0);
    const int64_t token = s0.q_len / 2;
    dirty.SetQuery(s0, token, 1, 3, NAN);
    for (const Engine& engine : AllEngines()) {
      SCOPED_TRACE(engine.Name() + ": " + op.Describe());
      const Attended want = Attend(engine, p, mask), have = Attend(engine, dirty.problem(), mask);
      for (int b = 0; b < p.batch; ++b) {
        if (b == other) continue;
        const Sequence s = clean.sequence(b);
        int64_t changed = 0;
        for (int64_t i = 0; i < s.q_len; ++i) {
          for (int h = 0; h < p.q_heads; ++h) {
            if (b == 0 && i == token && h == 1) continue;
            const int64_t r = LogicalRow(p, s, i, h);
            changed += std::bit_cast<uint32_t>(want.lse[r]) != std::bit_cast<uint32_t>(have.lse[r]);
            changed += std::memcmp(&want.out[r * p.head_dim], &have.out[r * p.head_dim], size_t(p.head_dim) * 4) != 0;
          }
        }
        EXPECT_EQ(changed, 0) << "rows of sequence " << b;
      }
    }
  }
}

TEST(Properties, NanAndInfAnywhereEndWell) {
  for (const OpCase& op : Thinned(MixedCases(), 3)) {
    for (const unsigned share : {1u, 50u}) { // everything, or one element in 50
      OpData data(op);
      const fp_problem& p = data.problem();
      std::mt19937 random(share);
      const float values[] = {NAN, kInf, -kInf, 3e38f, 1e-40f, -0.0f};
      for (int b = 0; b < p.batch; ++b) {
        const Sequence s = data.sequence(b);
        for (int64_t d = 0; d < p.head_dim; ++d) {
          for (int64_t i = 0; i < s.q_len; ++i) {
            for (int h = 0; h < p.q_heads; ++h) {
              if (random() % share == 0) data.SetQuery(s, i, h, d, values[random() % 6]);
            }
          }
          for (int64_t t = 0; t < s.k_len; ++t) {
            for (int h = 0; h < p.kv_heads; ++h) {
              if (random() % share == 0) data.SetKey(p.k, s, t, h, d, values[random() % 6]);
              if (random() % share == 0) data.SetKey(p.v, s, t, h, d, values[random() % 6]);
            }
          }
        }
      }
      for (const Engine& engine : AllEngines()) {
        SCOPED_TRACE(engine.Name() + ": " + op.Describe());
        for (const AnyPolicy& policy : MixedPolicies(data.problem().q_heads)) {
          const Prefilled result = Prefill(engine, p, policy); // forced blocks and zeros beyond the visible ones stay
          const Geometry g = Geometry::Of(p, *policy.get());
          for (int b = 0; b < p.batch; ++b) {
            const Sequence s = data.sequence(b);
            for (int64_t m = 0; m < g.Tiles(s); ++m) {
              const Tile tile = g.TileOf(p, s, m);
              const uint64_t* row = result.mask.Row(g.Row(s, 0, m));
              for (int64_t block = 0; block < g.words * 64; ++block) {
                if (block >= tile.visible) {
                  ASSERT_FALSE(TestBit(row, block)) << Name(policy);
                } else if (IsForced(*policy.get(), tile, block)) {
                  ASSERT_TRUE(TestBit(row, block)) << Name(policy);
                }
              }
            }
          }
        }
      }
    }
  }
}

// With equal keys in a block, and equal values, a block's means lose nothing.
TEST(Properties, TheCorrectionIsExactForBlocksOfEqualKeys) {
  for (const int32_t dtype : Thinned<int32_t>({FP_BF16, FP_F16, FP_F32})) {
    OpCase op;
    op.lengths = {{150, 700}};
    op.kv_heads = 2;
    op.group = 2;
    op.AllDtypes(dtype);
    OpData data(op);
    const fp_problem& p = data.problem();
    const int block_size = 64;
    const Sequence s = data.sequence(0);
    for (int64_t t = 0; t < s.k_len; ++t) {
      for (int h = 0; h < p.kv_heads; ++h) {
        for (int d = 0; d < p.head_dim; ++d) {
          for (const fp_tensor* x : {&p.k, &p.v}) {
            data.SetKey(*x, s, t, h, d, data.Key(*x, s, t / block_size * block_size, h, d));
          }
        }
      }
    }
    const Attended expected = DenseAttention(data);
    for (const Engine& engine : AllEngines()) {
      for (const bool shared : {false, true}) {
        Mask mask = RandomMask(p, block_size, shared, true, 0.3, 5);
        const Geometry g = Geometry::Of(p, mask.view);
        for (int64_t h = 0; h < g.mask_heads; ++h) {
          for (int64_t m = 0; m < g.Tiles(s); ++m) {
            const Tile tile = g.TileOf(p, s, m);
            for (int64_t b = tile.full; b < tile.visible; ++b) SetBit(mask.Row(g.Row(s, h, m)), b);
          }
        }
        EXPECT_TRUE(Close(p, expected, Attend(engine, p, mask))) << engine.Name();
      }
    }
  }
}

TEST(Properties, StatsCountWhatTheMaskKeeps) {
  ForAllEngines(MixedCases()[2], [](const Engine& engine, const OpData& data) {
    const fp_problem& p = data.problem();
    for (const AnyPolicy& policy : MixedPolicies(data.problem().q_heads)) {
      Mask mask = Select(engine, p, policy);
      const Geometry g = Geometry::Of(p, mask.view);
      std::vector<int64_t> kept(static_cast<size_t>(p.batch * g.mask_heads)), total(static_cast<size_t>(p.batch));
      std::vector<int32_t> fallback(static_cast<size_t>(p.batch));
      fp_stats stats;
      fp_stats_init(&stats);
      stats.kept = kept.data();
      stats.total = total.data();
      stats.fallback = fallback.data();
      ASSERT_EQ(fp_mask_stats(&p, &mask.view, &stats), FP_OK) << fp_last_error();
      EXPECT_EQ(fallback, mask.fallback);
      for (int b = 0; b < p.batch; ++b) {
        const Sequence s = data.sequence(b);
        int64_t visible = 0;
        for (int64_t m = 0; m < g.Tiles(s); ++m) visible += g.TileOf(p, s, m).visible;
        EXPECT_EQ(total[b], visible);
        for (int h = 0; h < g.mask_heads; ++h) {
          int64_t bits = 0;
          for (int64_t m = 0; m < g.Tiles(s); ++m) bits += mask.counts[g.Row(s, h, m)];
          EXPECT_EQ(kept[b * g.mask_heads + h], bits);
        }
      }
    }
  });
}

} // namespace
} // namespace flashprefill::test
