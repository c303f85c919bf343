// Tiles and their blocks, forced blocks, rows of a mask: each against the plainest statement of what it means.
#include <gtest/gtest.h>

#include <random>
#include <tuple>

#include "core/types.h"
#include "engine.h"

namespace flashprefill::test {
namespace {

// Problems of one sequence of every small length and prefix.
template <typename Body>
void ForGeometries(const Body& body) {
  for (const int group : {1, 3, 8}) {
    for (const int block_size : {16, 64, 128}) {
      for (const int64_t q : {0, 1, 15, 16, 42, 43, 127, 128, 129, 300}) {
        for (const int64_t prefix : {0, 1, 15, 16, 63, 64, 127, 129, 500}) {
          fp_problem p;
          fp_problem_init(&p);
          p.batch = 1;
          p.kv_heads = 1;
          p.q_heads = group;
          p.max_seqlen_q = p.total_q = q;
          p.max_seqlen_k = prefix + q;
          body(p, Geometry::Of(p, block_size, group > 1));
        }
      }
    }
  }
}

TEST(Geometry, TilesSeeWhatTheirRowsSee) {
  ForGeometries([](const fp_problem& p, const Geometry& g) {
    const Sequence s = SequenceOf(p, 0);
    int64_t next = 0;
    for (int64_t m = 0; m < g.Tiles(s); ++m) {
      const Tile t = g.TileOf(p, s, m);
      ASSERT_EQ(t.begin, next);
      ASSERT_TRUE(t.end > t.begin && (t.end - t.begin) * g.heads_per_tile <= kTileRows);
      next = t.end;
      const int64_t first = s.prefix + t.begin, last = s.prefix + t.end - 1;
      for (int64_t b = 0; b < g.Blocks(s) + 2; ++b) {
        const int64_t begin = b * g.block_size, end = std::min(begin + g.block_size, s.k_len);
        const bool exists = begin < s.k_len;
        ASSERT_EQ(b < t.visible, exists && begin <= last);                             // some row sees some key
        ASSERT_EQ(b < t.full, exists && begin + g.block_size <= first && end <= last); // before the first row's block
        ASSERT_EQ(b == t.diagonal, begin <= first && first < begin + g.block_size);
      }
    }
    ASSERT_EQ(next, s.q_len);
  });
}

TEST(Geometry, AllForcedMeansThatNothingIsLeftToSelect) {
  int64_t all = 0, some = 0;
  ForGeometries([&](const fp_problem& p, const Geometry& g) {
    const Sequence s = SequenceOf(p, 0);
    for (const auto& [sink, window, tail] :
         {std::tuple{0, 0, 0}, {0, 1, 0}, {2, 4, 2}, {1, 2, 1}, {0, 3, 3}, {5, 0, 0}, {0, 0, 40}}) {
      AnyPolicy policy = Streaming(g.block_size, sink, window, tail);
      policy.common.share_heads = g.heads_per_tile > 1;
      bool left = false;
      for (int64_t m = 0; m < g.Tiles(s); ++m) {
        if (InDenseTail(g, policy.common, s, m)) continue;
        const Tile t = g.TileOf(p, s, m);
        for (int64_t b = 0; b < t.visible; ++b) left |= !IsForced(policy.common, t, b);
      }
      ASSERT_EQ(KeepsEverything(p, g, policy.common, s), !left) << Name(policy) << ", " << s.q_len << "/" << s.k_len;
      ++(left ? some : all);
    }
  });
  EXPECT_GT(all, 100);
  EXPECT_GT(some, 100);
}

TEST(Geometry, SequencesHaveRowsOfTheirOwn) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    OpCase op;
    op.lengths.clear();
    op.q_layout = op.k_layout = Layout::kPacked;
    op.head_dim = 1;
    op.group = 1 + static_cast<int>(random() % 12);
    const int64_t batch = random() % 6;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t q = random() % 3 ? random() % 300 : 0;
      op.lengths.push_back({q, q});
    }
    const OpData data(op);
    const Geometry g = Geometry::Of(data.problem(), 64, round % 2);
    int64_t used = 0;
    for (int b = 0; b < batch; ++b) {
      const Sequence s = data.sequence(b);
      ASSERT_GE(g.TileBase(s), used);
      used = g.TileBase(s) + g.Tiles(s);
    }
    ASSERT_LE(used, g.tile_rows);
  }
}

TEST(MaskRows, WordsAndBits) {
  uint64_t row[3];
  for (int64_t n : {0, 1, 63, 64, 65, 128, 191, 192}) {
    FillRow(row, 3, n);
    for (int64_t b = 0; b < 192; ++b) ASSERT_EQ(TestBit(row, b), b < n) << n;
    FillRow(row, 3, 192);
    for (int64_t w = 0; w < 3; ++w) row[w] = VisibleWord(row, w, n);
    for (int64_t b = 0; b < 192; ++b) ASSERT_EQ(TestBit(row, b), b < n) << n;
    if (n < 192) SetBit(row, n);
    for (int64_t b = 0; b < 192; ++b) ASSERT_EQ(TestBit(row, b), b <= n) << n;
  }
}

} // namespace
} // namespace flashprefill::test
