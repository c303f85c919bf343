// MInference (arXiv 2407.02490) on the CPU, head by head: see reference.cc for the rules, docs/methods/minference.md
// for why.
#include "core/vertical_slash.h"
#include "cpu/vertical_slash/vertical_slash.h"
#include "methods/minference/patterns.h"

namespace flashprefill::methods::minference {
namespace {

// The tokens in ranks become a list of the mask: 0, the verticals, or 1, the slashes.
void WriteList(const cpu::HeadCall& call, int list, int64_t count) {
  int32_t* own = VerticalSlashAt(call.mask, call.s.index, call.head);
  int32_t* to = own + 2 + (list == 0 ? 0 : call.mask.max_verticals);
  std::sort(call.scratch.ranks, call.scratch.ranks + count);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<int32_t>(call.scratch.ranks[i]);
  own[list] = static_cast<int32_t>(count);
}

// Verticals as blocks, the same for all tiles; slashes as a running count, so that whether some slash crosses a block
// on its way through a tile is one subtraction.
void VerticalSlash(const cpu::HeadCall& call, const fp_minference_head& own) {
  const cpu::VerticalSlashScratch& t = call.scratch;
  const int64_t keys = call.s.k_len, size = call.block_size();
  cpu::SumVerticalSlash(call, kRows, false);
  std::reverse(t.slashes, t.slashes + keys); // now by distance

  std::fill_n(t.vertical_blocks, DivUp<int64_t>(call.blocks(), 64), uint64_t{0});
  const bool in_blocks = reinterpret_cast<const fp_minference&>(call.policy).rounding == FP_ROUND_BLOCKS;
  const int64_t verticals = cpu::Best(t.verticals, 1, keys, kFirstVerticals, VerticalsOf(own), t.ranks);
  if (!in_blocks) WriteList(call, 0, verticals);
  for (int64_t i = 0; in_blocks && i < verticals; ++i)
    SetBit(t.vertical_blocks, static_cast<int64_t>(t.ranks[i]) / size);

  const int64_t slashes = cpu::Best(t.slashes, 1, keys, kNearSlashes, SlashesOf(own), t.ranks);
  if (!in_blocks) {
    WriteList(call, 1, slashes);
    return;
  }
  std::fill_n(t.counts, keys + 1, 0);
  for (int64_t i = 0; i < slashes; ++i) t.counts[t.ranks[i] + 1] = 1;
  for (int64_t d = 0; d < keys; ++d) t.counts[d + 1] += t.counts[d]; // chosen slashes below d

  for (int64_t m = 0; m < call.g.Tiles(call.s); ++m) {
    const Tile tile = call.g.TileOf(call.p, call.s, m);
    uint64_t* row = call.Row(m);
    std::copy_n(t.vertical_blocks, DivUp<int64_t>(call.blocks(), 64), row);
    const int64_t first = call.s.prefix + tile.begin, last = call.s.prefix + tile.end - 1;
    for (int64_t block = 0; block < tile.visible; ++block) {
      const int64_t begin = block * size, end = begin + call.g.BlockKeys(call.s, block);
      const int64_t nearest = std::max<int64_t>(0, first - (end - 1)), farthest = last - begin;
      if (t.counts[farthest + 1] > t.counts[nearest]) SetBit(row, block);
    }
  }
}

void AShape(const cpu::HeadCall& call, int64_t first, int64_t nearest) {
  const int64_t size = call.block_size();
  for (int64_t m = 0; m < call.g.Tiles(call.s); ++m) {
    const Tile tile = call.g.TileOf(call.p, call.s, m);
    uint64_t* row = call.Row(m);
    FillRow(row, call.g.words, std::min(DivUp(first, size), tile.visible));
    const int64_t local = std::max<int64_t>(0, call.s.prefix + tile.begin - nearest + 1) / size;
    for (int64_t block = local; block < tile.visible; ++block) SetBit(row, block);
  }
}

void BlockSparse(const cpu::HeadCall& call, int64_t count) {
  const cpu::VerticalSlashScratch& t = call.scratch;
  const int64_t size = call.block_size(), n = call.query_blocks();
  cpu::MeanKeys(call);
  cpu::PoolQueries(call);
  for (int64_t panel = 0; panel < DivUp<int64_t>(n, cpu::kPanelRows); ++panel) {
    cpu::ForPooledScores(call, panel, [&](const cpu::ScoreChunk& chunk) {
      std::copy_n(chunk.scores, chunk.count * cpu::kPanelRows, t.logits + chunk.first * cpu::kPanelRows);
    });
    for (int64_t r = panel * cpu::kPanelRows; r < std::min((panel + 1) * cpu::kPanelRows, n); ++r) {
      const int64_t kept =
          cpu::Best(t.logits + r % cpu::kPanelRows, cpu::kPanelRows, t.query_seen[r], 0, count, t.ranks);
      const int64_t last = std::min((r + 1) * size, call.s.q_len) - 1;
      for (int64_t m = r * size / call.g.tile_tokens; m <= last / call.g.tile_tokens; ++m) {
        for (int64_t i = 0; i < kept; ++i) SetBit(call.Row(m), static_cast<int64_t>(t.ranks[i]));
      }
    }
  }
}

void ChooseHead(const cpu::HeadCall& call) {
  const fp_minference_head own = PatternOf(reinterpret_cast<const fp_minference&>(call.policy), call.head);
  switch (own.pattern) {
    case FP_A_SHAPE:
      return AShape(call, own.a, own.b);
    case FP_BLOCK_SPARSE:
      return BlockSparse(call, own.a);
    default:
      return VerticalSlash(call, own);
  }
}

class Selection : public cpu::HeadSelection {
 public:
  explicit Selection(const cpu::SelectCall& call)
      : HeadSelection(call, {.last_rows = kRows, .tokens = true, .pooled_logits = true}, ChooseHead) {}
};

} // namespace

extern const cpu::Selector kCpu = cpu::SelectorBy<Selection>();

} // namespace flashprefill::methods::minference
