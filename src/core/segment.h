// A segment of queries that shares a list of keys: which keys are ranked for it, and which are kept as blocks. Gather
// and S2O share this, the reference and the CPU; what a key is worth they say each for themselves.
#ifndef FLASHPREFILL_CORE_SEGMENT_H_
#define FLASHPREFILL_CORE_SEGMENT_H_

#include <algorithm>

#include "core/types.h"

namespace flashprefill {

// Tiles of a segment of so many tokens.
inline int64_t SegmentTiles(int64_t tokens, const Geometry& g) {
  return std::max<int64_t>(1, tokens / std::max(1, g.tile_tokens));
}

struct Segment {
  int64_t first_tile, end_tile; // tiles [first_tile, end_tile)
  int64_t begin, end;           // query tokens
  int64_t window;               // the first block of the window before its first token: kept from here on
  int64_t first_key, end_key;   // keys that are ranked; none where its tiles keep everything

  // Segment i of a sequence, if segments are of so many tiles.
  static Segment Of(const Problem& p, const Geometry& g, const Policy& policy, const Sequence& s, int64_t tiles,
                    int64_t i) {
    Segment segment{};
    segment.first_tile = i * tiles;
    segment.end_tile = std::min(segment.first_tile + tiles, g.Tiles(s));
    const Tile first = g.TileOf(p, s, segment.first_tile);
    segment.begin = first.begin;
    segment.end = std::min(segment.end_tile * g.tile_tokens, s.q_len);
    segment.window = std::max<int64_t>(0, first.diagonal - std::max(0, policy.window_blocks - 1));
    segment.end_key = segment.window * g.block_size;
    segment.first_key = std::min(int64_t{policy.sink_blocks} * g.block_size, segment.end_key);
    if (InDenseTail(g, policy, s, segment.first_tile)) segment.first_key = segment.end_key;
    return segment;
  }

  int64_t ranked() const { return end_key - first_key; }
};

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_SEGMENT_H_
