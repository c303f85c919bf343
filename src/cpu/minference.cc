// MInference's choice for one head: see reference/minference.cc for the rules, docs/methods/minference.md for why.
#include "core/vertical_slash.h"
#include "cpu/vertical_slash.h"
#include "methods/minference/patterns.h"

namespace flashprefill::cpu {
namespace {

// The columns or distances in ranks become a list of the mask.
void WriteLine(const HeadCall& call, int list, int64_t count) {
  int32_t* lines = VerticalSlashAt(call.mask, call.s.index, call.head);
  int32_t* to = lines + 2 + (list == 0 ? 0 : call.mask.max_verticals);
  std::sort(call.scratch.ranks, call.scratch.ranks + count);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<int32_t>(call.scratch.ranks[i]);
  lines[list] = static_cast<int32_t>(count);
}

// Columns as blocks, for all tiles alike; distances as a running count, so that whether some distance crosses a block
// on its way through a tile is one subtraction.
void VerticalSlash(const HeadCall& call, int64_t a, int64_t b) {
  const VerticalSlashScratch& t = call.scratch;
  const int64_t keys = call.s.k_len, size = call.block_size();
  SumVerticalSlash(call, methods::minference::kRows, false);
  std::reverse(t.diagonal, t.diagonal + keys); // now by distance

  std::fill_n(t.columns, DivUp<int64_t>(call.blocks(), 64), uint64_t{0});
  const bool in_blocks = reinterpret_cast<const fp_minference&>(call.policy).rounding == FP_ROUND_BLOCKS;
  const int64_t columns = Best(t.column, 1, keys, methods::minference::kFirstVerticals,
                               std::max(a, methods::minference::kFirstVerticals), t.ranks);
  if (!in_blocks) WriteLine(call, 0, columns);
  for (int64_t i = 0; in_blocks && i < columns; ++i) SetBit(t.columns, static_cast<int64_t>(t.ranks[i]) / size);

  const int64_t distances = Best(t.diagonal, 1, keys, methods::minference::kNearSlashes,
                                 std::max(b, methods::minference::kLeastSlashes), t.ranks);
  if (!in_blocks) {
    WriteLine(call, 1, distances);
    for (int64_t m = 0; m < call.g.Tiles(call.s); ++m) FillRow(call.Row(m), call.g.words, 0);
    return;
  }
  std::fill_n(t.counts, keys + 1, 0);
  for (int64_t i = 0; i < distances; ++i) t.counts[t.ranks[i] + 1] = 1;
  for (int64_t d = 0; d < keys; ++d) t.counts[d + 1] += t.counts[d]; // chosen distances below d

  for (int64_t m = 0; m < call.g.Tiles(call.s); ++m) {
    const Tile tile = call.g.TileOf(call.p, call.s, m);
    uint64_t* row = call.Row(m);
    FillRow(row, call.g.words, 0);
    std::copy_n(t.columns, DivUp<int64_t>(call.blocks(), 64), row);
    const int64_t first = call.s.prefix + tile.begin, last = call.s.prefix + tile.end - 1;
    for (int64_t block = 0; block < tile.visible; ++block) {
      const int64_t begin = block * size, end = begin + call.g.BlockKeys(call.s, block);
      const int64_t nearest = std::max<int64_t>(0, first - (end - 1)), farthest = last - begin;
      if (t.counts[farthest + 1] > t.counts[nearest]) SetBit(row, block);
    }
  }
}

void AShape(const HeadCall& call, int64_t first, int64_t nearest) {
  const int64_t size = call.block_size();
  for (int64_t m = 0; m < call.g.Tiles(call.s); ++m) {
    const Tile tile = call.g.TileOf(call.p, call.s, m);
    uint64_t* row = call.Row(m);
    FillRow(row, call.g.words, std::min(DivUp(first, size), tile.visible));
    const int64_t local = std::max<int64_t>(0, call.s.prefix + tile.begin - nearest + 1) / size;
    for (int64_t block = local; block < tile.visible; ++block) SetBit(row, block);
  }
}

void BlockSparse(const HeadCall& call, int64_t count) {
  const VerticalSlashScratch& t = call.scratch;
  const int64_t size = call.block_size(), n = call.query_blocks();
  MeanKeys(call);
  PoolQueries(call);
  for (int64_t m = 0; m < call.g.Tiles(call.s); ++m) FillRow(call.Row(m), call.g.words, 0);
  for (int64_t panel = 0; panel < DivUp<int64_t>(n, kPanelRows); ++panel) {
    ForPooledScores(call, panel, [&](const ScoreChunk& chunk) {
      std::copy_n(chunk.scores, chunk.count * kPanelRows, t.logits + chunk.first * kPanelRows);
    });
    for (int64_t r = panel * kPanelRows; r < std::min((panel + 1) * kPanelRows, n); ++r) {
      const int64_t kept = Best(t.logits + r % kPanelRows, kPanelRows, t.query_seen[r], 0, count, t.ranks);
      const int64_t last = std::min((r + 1) * size, call.s.q_len) - 1;
      for (int64_t m = r * size / call.g.tile_tokens; m <= last / call.g.tile_tokens; ++m) {
        for (int64_t i = 0; i < kept; ++i) SetBit(call.Row(m), static_cast<int64_t>(t.ranks[i]));
      }
    }
  }
}

} // namespace

void ChooseMInference(const HeadCall& call) {
  const fp_minference_head own =
      methods::minference::PatternOf(reinterpret_cast<const fp_minference&>(call.policy), call.head);
  switch (own.pattern) {
    case FP_A_SHAPE:
      return AShape(call, own.a, own.b);
    case FP_BLOCK_SPARSE:
      return BlockSparse(call, own.a);
    default:
      return VerticalSlash(call, own.a, own.b);
  }
}

} // namespace flashprefill::cpu
