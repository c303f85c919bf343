// Streaming: masks of forced blocks alone.
#include <gtest/gtest.h>

#include "by_hand.h"
#include "method_suite.h"

namespace flashprefill::test {
namespace {

std::vector<AnyPolicy> Policies(int block_size, int) {
  return {Streaming(block_size, 1, 2, 1), Shared(Streaming(block_size, 2, 0, 0)), Streaming(block_size, 0, 3, 2)};
}

const RegisterSuite suite({.method = "streaming", .policies = Policies});

TEST(StreamingByHand, SinkWindowAndDiagonal) {
  OpData data(OneDimension({512, 512}));
  // Blocks of 64, tiles of 128: tile 3 begins at 384, so its diagonal is blocks 6 and 7, and tile 2's is 4 and 5. A
  // window of 2 reaches one block further back; windows of 0 and 1 are the diagonal alone.
  const auto expect = [&](int sink, int window, int tail, const std::vector<Blocks>& rows) {
    for (int64_t m = 0; m < 4; ++m) ExpectKept(data, Streaming(64, sink, window, tail), m, rows[m]);
  };
  expect(1, 2, 0, {{0, 1}, {0, 1, 2, 3}, {0, 3, 4, 5}, {0, 5, 6, 7}});
  expect(0, 0, 0, {{0, 1}, {2, 3}, {4, 5}, {6, 7}});
  expect(0, 1, 0, {{0, 1}, {2, 3}, {4, 5}, {6, 7}});
  expect(3, 0, 0, {{0, 1}, {0, 1, 2, 3}, {0, 1, 2, 4, 5}, {0, 1, 2, 6, 7}});
  // A tail of one block is half a tile, so one tile; of three blocks, two tiles.
  expect(0, 0, 1, {{0, 1}, {2, 3}, {4, 5}, {0, 1, 2, 3, 4, 5, 6, 7}});
  expect(0, 0, 3, {{0, 1}, {2, 3}, {0, 1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5, 6, 7}});
}

TEST(StreamingByHand, ADiagonalAcrossABorderIsTwoBlocks) {
  OpData data(OneDimension({128, 200}));
  // P = 72: positions 72..199. The first row's own block is 72 / 128 = 0, the last row's 1.
  ExpectKept(data, Streaming(128, 0, 1, 0), 0, {0, 1});
  // With blocks of 64: 72 / 64 = 1 to 199 / 64 = 3.
  ExpectKept(data, Streaming(64, 0, 1, 0), 0, {1, 2, 3});
}

TEST(StreamingByHand, TheDenseTailIsForFinalChunks) {
  OpCase op = OneDimension({512, 512});
  op.final_chunk = false;
  OpData data(op);
  ExpectKept(data, Streaming(64, 0, 0, 2), 3, {6, 7});
}

} // namespace
} // namespace flashprefill::test
