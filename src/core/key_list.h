// Key lists of a mask: see fp_block_mask. What a tile attends to is its kept blocks and the keys of its segment's list
// that lie in none of them.
#ifndef FLASHPREFILL_CORE_KEY_LIST_H_
#define FLASHPREFILL_CORE_KEY_LIST_H_

#include "core/types.h"

namespace flashprefill {

inline bool HasKeyLists(const BlockMask& m) { return m.max_keys > 0; }

// int32 of one list: both numbers, then the keys.
inline int64_t KeyListStride(const BlockMask& m) { return HasKeyLists(m) ? 2 + int64_t{m.max_keys} : 0; }

inline int64_t SegmentTokens(const BlockMask& m) { return int64_t{m.segment_tiles} * m.tile_tokens; }
inline int64_t SegmentRows(const Problem& p, const BlockMask& m) {
  return HasKeyLists(m) ? p.total_q / SegmentTokens(m) + p.batch : 0;
}

// Segments of a sequence, and the first row that they have in key_lists.
inline int64_t Segments(const BlockMask& m, const Sequence& s) {
  return HasKeyLists(m) ? DivUp(s.q_len, SegmentTokens(m)) : 0;
}
inline int64_t SegmentBase(const BlockMask& m, const Sequence& s) { return s.q_begin / SegmentTokens(m) + s.index; }

inline int32_t* KeyListAt(const BlockMask& m, const Sequence& s, int64_t head, int64_t segment) {
  return m.key_lists + (head * m.segment_rows + SegmentBase(m, s) + segment) * KeyListStride(m);
}

// What a policy's mask needs room for.
struct KeyListRoom {
  int64_t keys = 0;          // per list
  int64_t segment_tiles = 0; // tiles per list
};

struct KeyList {
  const int32_t* keys = nullptr;
  int64_t count = 0, wanted = 0;

  bool overflows() const { return wanted > count; }

  static KeyList Of(const BlockMask& m, const Sequence& s, int64_t head, int64_t segment) {
    if (!HasKeyLists(m)) return {};
    const int32_t* at = KeyListAt(m, s, head, segment);
    return {at + 2, at[0], at[1]};
  }
  static KeyList OfTile(const BlockMask& m, const Sequence& s, int64_t head, int64_t tile) {
    return HasKeyLists(m) ? Of(m, s, head, tile / m.segment_tiles) : KeyList{};
  }
};

// How many keys the list adds to a tile with these bits, as blocks: rounded to the nearest, so that sums over tiles are
// right on average.
inline int64_t ListedBlocks(const Geometry& g, const Sequence& s, const Tile& tile, const KeyList& list,
                            const uint64_t* bits) {
  int64_t keys = 0;
  for (int64_t i = 0; i < list.count && list.keys[i] < s.prefix + tile.end; ++i) {
    keys += !TestBit(bits, list.keys[i] / g.block_size);
  }
  return (keys + g.block_size / 2) / g.block_size;
}

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_KEY_LIST_H_
