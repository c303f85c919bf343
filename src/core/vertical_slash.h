// The extra keys of a mask: verticals and slashes of single tokens, by (sequence, mask head). A tile sees the key of
// every vertical, and for every slash d the keys that lie d behind some row of it.
#ifndef FLASHPREFILL_CORE_VERTICAL_SLASH_H_
#define FLASHPREFILL_CORE_VERTICAL_SLASH_H_

#include "core/types.h"

namespace flashprefill {

inline bool HasVerticalSlash(const BlockMask& m) { return m.max_verticals > 0 || m.max_slashes > 0; }

// int32 of one (sequence, mask head): both counts, then the lists.
inline int64_t VerticalSlashStride(const BlockMask& m) {
  return HasVerticalSlash(m) ? 2 + int64_t{m.max_verticals} + m.max_slashes : 0;
}

inline int32_t* VerticalSlashAt(const BlockMask& m, int64_t sequence, int64_t head) {
  return m.vertical_slash + (sequence * m.heads + head) * VerticalSlashStride(m);
}

// What a policy's mask needs room for: as many as any of its heads may choose.
struct VerticalSlashRoom {
  int64_t verticals = 0, slashes = 0;
};

struct VerticalSlash {
  const int32_t* verticals = nullptr;
  const int32_t* slashes = nullptr;
  int64_t vertical_count = 0, slash_count = 0;

  static VerticalSlash Of(const BlockMask& m, int64_t sequence, int64_t head) {
    VerticalSlash l;
    if (!HasVerticalSlash(m)) return l;
    const int32_t* at = VerticalSlashAt(m, sequence, head);
    l.vertical_count = at[0];
    l.slash_count = at[1];
    l.verticals = at + 2;
    l.slashes = l.verticals + m.max_verticals;
    return l;
  }
};

// Calls body(begin, end) for the runs of keys that verticals and slashes add to a tile's kept blocks, ascending. Rows
// still see no further than themselves.
template <typename Body>
void ForVerticalSlashRuns(const Geometry& g, const Sequence& s, const Tile& tile, const VerticalSlash& extra,
                          const uint64_t* bits, const Body& body) {
  const int64_t first = s.prefix + tile.begin, limit = s.prefix + tile.end;
  int64_t done = 0, column = 0;
  const auto add = [&](int64_t begin, int64_t end) {
    for (begin = std::max(begin, done), end = std::min(end, limit); begin < end;) {
      const int64_t block = begin / g.block_size, stop = std::min((block + 1) * g.block_size, end);
      if (!TestBit(bits, block)) body(begin, stop);
      done = begin = stop;
    }
  };
  // The farthest distance first: its keys come first.
  for (int64_t i = extra.slash_count - 1; i >= 0; --i) {
    const int64_t begin = first - extra.slashes[i];
    for (; column < extra.vertical_count && extra.verticals[column] < begin; ++column) {
      add(extra.verticals[column], extra.verticals[column] + 1);
    }
    add(begin, limit - extra.slashes[i]);
  }
  for (; column < extra.vertical_count; ++column) add(extra.verticals[column], extra.verticals[column] + 1);
}

// How many keys verticals and slashes add to a tile.
inline int64_t VerticalSlashKeys(const Geometry& g, const Sequence& s, const Tile& tile, const VerticalSlash& extra,
                                 const uint64_t* bits) {
  int64_t keys = 0;
  ForVerticalSlashRuns(g, s, tile, extra, bits, [&](int64_t begin, int64_t end) { keys += end - begin; });
  return keys;
}

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_VERTICAL_SLASH_H_
