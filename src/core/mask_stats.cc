// Counts what a mask keeps: see mask_stats.h.
#include "core/mask_stats.h"

#include <bit>

#include "core/key_list.h"
#include "core/vertical_slash.h"

namespace flashprefill {

int64_t KeptBlocks(const Problem& p, const Geometry& g, const BlockMask& mask, const Sequence& s, int64_t head,
                   int64_t m) {
  const uint64_t* row = mask.bits + g.Row(s, head, m) * g.words;
  const Tile tile = g.TileOf(p, s, m);
  int64_t kept = 0;
  for (int64_t w = 0; w < g.words; ++w) kept += std::popcount(VisibleWord(row, w, tile.visible));
  if (HasVerticalSlash(mask)) {
    const VerticalSlash extra = VerticalSlash::Of(mask, s.index, head);
    kept += DivUp<int64_t>(VerticalSlashKeys(g, s, tile, extra, row), g.block_size);
  }
  return kept + ListedBlocks(g, s, tile, KeyList::OfTile(mask, s, head, m), row);
}

void CountKept(const Problem& p, const BlockMask& mask, const Stats& stats) {
  const Geometry g = Geometry::Of(p, mask);
  for (int b = 0; b < p.batch; ++b) {
    const Sequence s = SequenceOf(p, b);
    int64_t total = 0;
    for (int64_t m = 0; m < g.Tiles(s); ++m) total += g.TileOf(p, s, m).visible;
    if (stats.total) stats.total[b] = total;
    if (stats.fallback) stats.fallback[b] = mask.fallback ? mask.fallback[b] : FP_SELECTED;
    for (int h = 0; stats.kept && h < g.mask_heads; ++h) {
      int64_t kept = 0;
      for (int64_t m = 0; m < g.Tiles(s); ++m) kept += KeptBlocks(p, g, mask, s, h, m);
      stats.kept[int64_t{b} * g.mask_heads + h] = kept;
    }
    for (int h = 0; stats.skipped && h < g.mask_heads; ++h) {
      int64_t skipped = 0;
      for (int64_t m = 0; mask.skip > 0 && mask.skipped && m < g.Tiles(s); ++m) skipped += mask.skipped[g.Row(s, h, m)];
      stats.skipped[int64_t{b} * g.mask_heads + h] = skipped;
    }
    for (int h = 0; stats.overflowed && h < g.mask_heads; ++h) {
      int64_t overflowed = 0;
      for (int64_t i = 0; i < Segments(mask, s); ++i) overflowed += KeyList::Of(mask, s, h, i).overflows();
      stats.overflowed[int64_t{b} * g.mask_heads + h] = overflowed;
    }
  }
}

} // namespace flashprefill
