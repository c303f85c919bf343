// The extra keys of a mask: columns and distances of single tokens, by (sequence, mask head). A tile sees every column,
// and for every distance d the keys that lie d behind some row of it.
#ifndef FLASHPREFILL_CORE_LINES_H_
#define FLASHPREFILL_CORE_LINES_H_

#include "core/minference.h"
#include "core/types.h"

namespace flashprefill {

inline bool HasLines(const BlockMask& m) { return m.columns_room > 0 || m.distances_room > 0; }

// int32 of one (sequence, mask head): both counts, then the lists.
inline int64_t LineStride(const BlockMask& m) {
  return HasLines(m) ? 2 + int64_t{m.columns_room} + m.distances_room : 0;
}

inline int32_t* LinesAt(const BlockMask& m, int64_t sequence, int64_t head) {
  return m.lines + (sequence * m.heads + head) * LineStride(m);
}

// What a policy's mask needs room for: as many as any of its heads may choose.
struct LineRoom {
  int64_t columns = 0, distances = 0;

  static LineRoom Of(const Problem& p, const Policy& policy) {
    LineRoom room;
    if (policy.kind != FP_MINFERENCE) return room;
    const auto& m = reinterpret_cast<const fp_minference&>(policy);
    if (m.rounding != FP_ROUND_TOKENS) return room;
    for (int64_t h = 0; h < (m.head_count > 0 ? p.q_heads : 1); ++h) {
      const fp_minference_head head = MInferenceHead(m, h);
      if (head.pattern != FP_VERTICAL_SLASH) continue;
      room.columns = std::max(room.columns, std::max<int64_t>(head.a, kMInferenceColumns));
      room.distances = std::max(room.distances, std::max<int64_t>(head.b, kMInferenceLeastDistances));
    }
    room.columns = std::min(room.columns, p.max_seqlen_k);
    room.distances = std::min(room.distances, p.max_seqlen_k);
    return room;
  }
};

struct Lines {
  const int32_t* columns = nullptr;
  const int32_t* distances = nullptr;
  int64_t column_count = 0, distance_count = 0;

  static Lines Of(const BlockMask& m, int64_t sequence, int64_t head) {
    Lines l;
    if (!HasLines(m)) return l;
    const int32_t* at = LinesAt(m, sequence, head);
    l.column_count = at[0];
    l.distance_count = at[1];
    l.columns = at + 2;
    l.distances = l.columns + m.columns_room;
    return l;
  }
};

// Calls body(begin, end) for the runs of keys that lines add to a tile's kept blocks, ascending. Rows still see no
// further than themselves.
template <typename Body>
void ForLineRuns(const Geometry& g, const Sequence& s, const Tile& tile, const Lines& lines, const uint64_t* bits,
                 const Body& body) {
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
  for (int64_t i = lines.distance_count - 1; i >= 0; --i) {
    const int64_t begin = first - lines.distances[i];
    for (; column < lines.column_count && lines.columns[column] < begin; ++column) {
      add(lines.columns[column], lines.columns[column] + 1);
    }
    add(begin, limit - lines.distances[i]);
  }
  for (; column < lines.column_count; ++column) add(lines.columns[column], lines.columns[column] + 1);
}

// How many keys lines add to a tile.
inline int64_t LineKeys(const Geometry& g, const Sequence& s, const Tile& tile, const Lines& lines,
                        const uint64_t* bits) {
  int64_t keys = 0;
  ForLineRuns(g, s, tile, lines, bits, [&](int64_t begin, int64_t end) { keys += end - begin; });
  return keys;
}

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_LINES_H_
