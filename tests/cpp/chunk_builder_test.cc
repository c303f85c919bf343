// cpu/attend/chunk_builder.h by itself, with a table of kernels that writes down what it is given.
#include "cpu/attend/chunk_builder.h"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

namespace flashprefill::cpu {
namespace {

struct Seen {
  int32_t columns;
  std::vector<std::pair<int64_t, int32_t>> runs; // first key, keys
  std::vector<int32_t> limit;
  int64_t next;
};
std::vector<Seen>* g_seen = nullptr;

void Record(const TileState& state, const Chunk& chunk) {
  Seen seen{chunk.columns, {}, {}, chunk.next};
  int32_t column = 0;
  for (int32_t i = 0; i < chunk.runs; ++i) {
    EXPECT_EQ(chunk.run[i].column, column); // runs lie side by side
    column += chunk.run[i].count;
    seen.runs.emplace_back(chunk.run[i].key, chunk.run[i].count);
  }
  EXPECT_EQ(column, chunk.columns);
  if (chunk.limit) seen.limit.assign(chunk.limit, chunk.limit + state.rows);
  g_seen->push_back(seen);
}

// A tile of rows [begin, end) of a sequence that has `prefix` keys before them.
class ChunkBuilderTest : public ::testing::Test {
 protected:
  ChunkBuilderTest() {
    g_seen = &seen_;
    kernels_.attend = Record;
    geometry_.heads_per_tile = 1;
    sequence_.prefix = 300;
    tile_.begin = 0, tile_.end = 3;
    state_.rows = 3;
  }
  ChunkBuilder Builder() { return {kernels_, state_, rows_, packed_, limit_}; }

  std::vector<Seen> seen_;
  AttendKernels kernels_{};
  TileState state_{};
  Geometry geometry_{};
  Sequence sequence_{};
  Tile tile_{};
  Packed packed_{};
  int32_t limit_[2 * kTileRows];
  const TileRows rows_{geometry_, sequence_, tile_, 0};
};

using Runs = std::vector<std::pair<int64_t, int32_t>>;

TEST_F(ChunkBuilderTest, NeighboursAreOneRunAndLongRunsAreCut) {
  ChunkBuilder chunks = Builder();
  chunks.Add(0, 64, false);
  chunks.Add(64, 256, false);
  chunks.Flush();
  ASSERT_EQ(seen_.size(), 2u);
  EXPECT_EQ(seen_[0].runs, Runs({{0, 128}}));
  EXPECT_EQ(seen_[1].runs, Runs({{128, 128}}));
  EXPECT_EQ(seen_[0].next, 128); // the chunk after it
  EXPECT_EQ(seen_[1].next, -1);
}

TEST_F(ChunkBuilderTest, RunsFromAnywhereFillAChunk) {
  ChunkBuilder chunks = Builder();
  for (int64_t key = 0; key < 640; key += 64) chunks.Add(key, key + 16, false);
  chunks.Flush(7);
  ASSERT_EQ(seen_.size(), 2u);
  EXPECT_EQ(seen_[0].runs.size(), 8u);
  EXPECT_EQ(seen_[1].runs, Runs({{512, 16}, {576, 16}}));
  EXPECT_EQ(seen_[1].next, 7);
}

TEST_F(ChunkBuilderTest, MaskedKeysHaveChunksAndLimitsOfTheirOwn) {
  ChunkBuilder chunks = Builder();
  chunks.Add(0, 32, false);
  chunks.Add(288, 303, true);
  chunks.Flush();
  ASSERT_EQ(seen_.size(), 2u);
  EXPECT_TRUE(seen_[0].limit.empty());
  EXPECT_EQ(seen_[0].runs, Runs({{0, 32}}));
  EXPECT_EQ(seen_[1].runs, Runs({{288, 15}}));
  EXPECT_EQ(seen_[1].limit, std::vector<int32_t>({13, 14, 15})); // rows stand at 300, 301 and 302
}

TEST_F(ChunkBuilderTest, NothingAddedIsNothingHandedOver) {
  ChunkBuilder chunks = Builder();
  chunks.Flush();
  chunks.Add(16, 16, false);
  chunks.Flush();
  EXPECT_TRUE(seen_.empty());
}

TEST_F(ChunkBuilderTest, EveryKeyComesOnceAndInOrder) {
  ChunkBuilder chunks = Builder();
  std::vector<int64_t> added;
  for (int64_t key = 0; key < 5000; key += 48 + key % 5 * 16) {
    chunks.Add(key, key + 48, false);
    for (int64_t i = key; i < key + 48; ++i) added.push_back(i);
  }
  chunks.Flush();
  std::vector<int64_t> seen;
  for (size_t i = 0; i < seen_.size(); ++i) {
    EXPECT_TRUE(seen_[i].columns == kChunk || i + 1 == seen_.size());
    for (const auto& [key, count] : seen_[i].runs) {
      for (int32_t j = 0; j < count; ++j) seen.push_back(key + j);
    }
  }
  EXPECT_EQ(seen, added);
}

} // namespace
} // namespace flashprefill::cpu
