// MInference (arXiv 2407.02490) on the CPU, head by head: see reference.cc for the rules, docs/methods/minference.md
// for why.
#include "cpu/vertical_slash/vertical_slash.h"
#include "methods/minference/patterns.h"

namespace flashprefill::methods::minference {
namespace {

void VerticalSlash(const cpu::HeadCall& call, const fp_minference_head& own) {
  const cpu::VerticalSlashScratch& t = call.scratch;
  const int64_t keys = call.s.k_len;
  const int32_t rounding = reinterpret_cast<const fp_minference&>(call.policy).rounding;
  cpu::SumVerticalSlash(call, kRows, false);
  std::reverse(t.slashes, t.slashes + keys); // now by distance
  cpu::KeepVerticals(call, cpu::Best(t.verticals, 1, keys, kFirstVerticals, VerticalsOf(own), t.ranks), rounding);
  cpu::KeepSlashes(call, cpu::Best(t.slashes, 1, keys, kNearSlashes, SlashesOf(own), t.ranks), rounding);
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
