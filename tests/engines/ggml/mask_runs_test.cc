// The mask's reader: every kind of mask that an engine makes, and some that none makes.
#include "mask_runs.h"

#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "key_order.h"

namespace flashprefill::ggml {
namespace {

constexpr uint16_t kSeen = 0, kHidden = 0xfc00;

struct Mask {
  int64_t rows, cells, stride;
  std::vector<uint16_t> data;

  Mask(int64_t r, int64_t c, int64_t padding = 0)
      : rows(r), cells(c), stride(c + padding), data(static_cast<size_t>(r * stride), kHidden) {}
  uint16_t& at(int64_t row, int64_t cell) { return data[static_cast<size_t>(row * stride + cell)]; }
  // In the order that the mask alone tells.
  std::vector<Run> Runs(int64_t least = 2, int64_t sink_keys = 0) const {
    auto runs = FindRuns(data.data(), rows, cells, stride, least, 2);
    for (Run& run : runs) {
      if (run.causal()) OrderKeys(run, {}, kNoCell, sink_keys);
    }
    return runs;
  }
  // Rows [first, first + count) are the last of a sequence that holds these cells, oldest first.
  void Causal(int64_t first, int64_t count, const std::vector<int32_t>& order) {
    for (int64_t r = 0; r < count; ++r) {
      const size_t seen = order.size() - static_cast<size_t>(count - 1 - r);
      for (size_t i = 0; i < seen; ++i) at(first + r, order[i]) = kSeen;
    }
  }
};

std::vector<int32_t> Range(int32_t begin, int32_t end) {
  std::vector<int32_t> cells(static_cast<size_t>(end - begin));
  std::iota(cells.begin(), cells.end(), begin);
  return cells;
}

std::vector<int32_t> Joined(std::initializer_list<std::vector<int32_t>> parts) {
  std::vector<int32_t> all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

TEST(MaskRuns, WholePrompt) {
  Mask mask(100, 256);
  mask.Causal(0, 100, Range(0, 100));
  const auto runs = mask.Runs();
  ASSERT_EQ(runs.size(), 1u);
  EXPECT_EQ(runs[0].rows, 100);
  EXPECT_EQ(runs[0].cells, Range(0, 100));
  EXPECT_TRUE(runs[0].contiguous());
}

TEST(MaskRuns, ChunkOfALongerPromptInAPaddedMask) {
  Mask mask(67, 300, 20);
  mask.Causal(0, 67, Range(10, 293));
  const auto runs = mask.Runs();
  ASSERT_EQ(runs.size(), 1u);
  EXPECT_EQ(runs[0].cells, Range(10, 293));
}

TEST(MaskRuns, SequencesOfUnequalLengthSideBySide) {
  Mask mask(130, 512);
  const auto first = Joined({Range(0, 90), Range(200, 250)}), second = Range(90, 200), third = Range(250, 280);
  mask.Causal(0, 50, first);
  mask.Causal(50, 60, second);
  mask.Causal(110, 20, third);
  const auto runs = mask.Runs();
  ASSERT_EQ(runs.size(), 3u);
  EXPECT_EQ(runs[0].cells, first);
  EXPECT_FALSE(runs[0].contiguous());
  EXPECT_EQ(runs[1].cells, second);
  EXPECT_EQ(runs[2].cells, third);
  EXPECT_EQ(runs[2].first, 110);
}

TEST(MaskRuns, DecodeRowsBesideAPromptAreJoinedIntoOneRunThatIsNotCausal) {
  Mask mask(44, 256);
  mask.Causal(0, 1, Range(0, 30));
  mask.Causal(1, 1, Range(30, 50));
  mask.Causal(2, 40, Range(60, 160));
  mask.Causal(42, 1, Range(160, 170));
  mask.Causal(43, 1, Range(170, 190));
  const auto runs = mask.Runs(16);
  ASSERT_EQ(runs.size(), 3u);
  EXPECT_FALSE(runs[0].causal());
  EXPECT_EQ(runs[0].rows, 2);
  EXPECT_EQ(runs[1].cells, Range(60, 160));
  EXPECT_FALSE(runs[2].causal());
  EXPECT_EQ(runs[2].first, 42);
  EXPECT_EQ(runs[2].rows, 2);
}

// What a context shift leaves: the first cells, a gap that the new rows fill, and older cells behind them.
TEST(MaskRuns, OlderCellsBehindTheRunsOwnFollowTheSink) {
  Mask mask(30, 256);
  const auto cells = Joined({Range(0, 40), Range(100, 200), Range(40, 60), Range(60, 90)});
  mask.Causal(0, 30, cells);
  const auto runs = mask.Runs(2, 40);
  ASSERT_EQ(runs.size(), 1u);
  EXPECT_EQ(runs[0].cells, cells);
}

TEST(MaskRuns, CellsOfTheRunItselfKeepTheOrderInWhichRowsSeeThem) {
  Mask mask(8, 64);
  const std::vector<int32_t> cells = {3, 4, 5, 40, 39, 2, 60, 7, 50, 1};
  mask.Causal(0, 8, cells);
  const auto runs = mask.Runs();
  ASSERT_EQ(runs.size(), 1u);
  ASSERT_EQ(runs[0].cells.size(), cells.size());
  EXPECT_TRUE(std::equal(cells.begin() + 3, cells.end(), runs[0].cells.begin() + 3));
}

TEST(MaskRuns, AnythingElseIsNotCausal) {
  const auto refused = [](const Mask& mask) {
    for (const auto& run : mask.Runs(4)) EXPECT_FALSE(run.causal());
  };
  Mask window(60, 128); // sliding: a cell comes, another goes
  for (int64_t r = 0; r < 60; ++r) {
    for (int64_t c = r; c < r + 40; ++c) window.at(r, c) = kSeen;
  }
  refused(window);
  Mask both_ways(60, 64); // every row sees all
  std::fill(both_ways.data.begin(), both_ways.data.end(), kSeen);
  refused(both_ways);
  Mask bias(60, 64); // a position bias
  bias.Causal(0, 60, Range(0, 60));
  for (int64_t r = 0; r < 60; ++r) bias.at(r, 0) = 0x3c00;
  refused(bias);
  Mask minus_zero(60, 64);
  minus_zero.Causal(0, 60, Range(0, 60));
  for (int64_t r = 0; r < 60; ++r) minus_zero.at(r, 0) = 0x8000;
  refused(minus_zero);
  Mask two_at_once(60, 128);
  for (int64_t r = 0; r < 60; ++r) {
    for (int64_t c = 0; c <= 2 * r + 1; ++c) two_at_once.at(r, c) = kSeen;
  }
  refused(two_at_once);
  refused(Mask(60, 64)); // nothing
}

TEST(MaskRuns, AFirstRowThatSeesNothingIsNoCausalSequence) {
  Mask mask(10, 64);
  for (int64_t r = 1; r < 10; ++r) {
    for (int64_t c = 0; c < r; ++c) mask.at(r, c) = kSeen;
  }
  for (const auto& run : mask.Runs(4)) EXPECT_FALSE(run.causal());
}

// Whatever the mask: the runs cover each row once, and a causal run says exactly which cells its rows see.
TEST(MaskRuns, RandomMasks) {
  std::mt19937 random(1);
  for (int round = 0; round < 300; ++round) {
    const int64_t cells = 1 + random() % 200;
    Mask mask(0, cells);
    std::vector<uint16_t> row(static_cast<size_t>(cells), kHidden);
    while (mask.rows < 60) {
      if (random() % 8 == 0) { // another sequence
        for (auto& x : row) x = random() % 2 ? kSeen : kHidden;
      }
      mask.data.insert(mask.data.end(), row.begin(), row.end());
      ++mask.rows;
      row[random() % row.size()] = random() % 20 == 0 ? kHidden : kSeen;
    }
    int64_t next = 0;
    for (const auto& run : mask.Runs(1 + random() % 5, random() % 50)) {
      ASSERT_EQ(run.first, next);
      next += run.rows;
      if (!run.causal()) continue;
      for (int64_t r = 0; r < run.rows; ++r) {
        std::vector<uint16_t> said(static_cast<size_t>(cells), kHidden);
        const size_t seen = run.cells.size() - static_cast<size_t>(run.rows - 1 - r);
        for (size_t i = 0; i < seen; ++i) said[static_cast<size_t>(run.cells[i])] = kSeen;
        for (int64_t c = 0; c < cells; ++c) ASSERT_EQ(said[static_cast<size_t>(c)], mask.at(run.first + r, c));
      }
    }
    ASSERT_EQ(next, mask.rows);
  }
}

} // namespace
} // namespace flashprefill::ggml
