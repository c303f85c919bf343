// S2O's ranking of keys on the CPU. The mean queries of some segments, those of all heads of a list, are the 32 lanes
// that pass over the keys together (cpu/vertical_slash/kernels.h), twice: for the denominators of their softmax, and
// for energies. So a key is loaded once for 32 mean queries in each pass, and ranking costs 2 / segment of the products
// of dense attention. What is kept per segment is one float for each key, since any key may be among those that are
// taken before it stops. Gather knows beforehand which energies are too little, and needs one pass (its own cpu.cc).
#ifndef FLASHPREFILL_CPU_KEY_RANKING_H_
#define FLASHPREFILL_CPU_KEY_RANKING_H_

#include <cmath>

#include "core/key_list.h"
#include "core/segment.h"
#include "cpu/frame.h"
#include "cpu/vertical_slash/kernels.h"
#include "cpu/vertical_slash/lanes.h"

namespace flashprefill::cpu {

constexpr int64_t kMeanRows = 128;                  // query rows that are added up
constexpr int64_t kMostEnergies = int64_t{4} << 20; // per thread, as long as a segment's own are fewer

class KeyRanking {
 public:
  struct Scratch {
    float* rows;     // [kMeanRows][head_dim]: of queries, then of keys
    float* mean;     // [head_dim]
    float* panels;   // [lanes / 32][head_dim][32]
    float* scores;   // [kChunkKeys][lanes]
    float* largest;  // [lanes]
    float* sums;     // [lanes]
    int32_t* seen;   // [lanes]
    float* energies; // [segments_][keys]
    uint64_t* ranks; // [keys]: for who keeps some of them
  };

  KeyRanking(const SelectCall& call, int64_t segment_tokens)
      : call_(call),
        kernels_(VerticalSlashKernelsFor(call.exec)),
        tiles_(SegmentTiles(segment_tokens, call.g)),
        heads_(call.g.heads_per_tile),
        keys_(std::max<int64_t>(1, call.p.max_seqlen_k)),
        segments_(std::clamp<int64_t>(kMostEnergies / keys_, 1, std::max(1, kPanelRows / heads_))),
        lanes_(DivUp<int64_t>(segments_ * heads_, kPanelRows) * kPanelRows) {}

  ItemShape Shape() const { return {.rows = segments_ * tiles_}; }
  Scratch TakeScratch(Workspace& memory) const {
    const int64_t d = call_.p.head_dim;
    return {.rows = memory.Take<float>(kMeanRows * d),
            .mean = memory.Take<float>(d),
            .panels = memory.Take<float>(lanes_ * d),
            .scores = memory.Take<float>(kChunkKeys * lanes_),
            .largest = memory.Take<float>(lanes_),
            .sums = memory.Take<float>(lanes_),
            .seen = memory.Take<int32_t>(lanes_),
            .energies = memory.Take<float>(segments_ * keys_),
            .ranks = memory.Take<uint64_t>(keys_)};
  }

  // Keeps the blocks of the item's segments, and calls keep(segment, energies of its ranked keys, its list) for each.
  template <typename Keep>
  void Choose(const Item& item, const Scratch& scratch, const Keep& keep) const {
    for (const MaskRow& row : item.rows) {
      const int64_t window = SegmentAt(item.s, row.m / tiles_).window;
      for (int64_t block = window; block < row.tile.visible; ++block) SetBit(row.bits, block);
    }
    // Rows come from the last tile on, and in whole segments.
    const int64_t first = item.rows.back().m / tiles_, end = item.rows.front().m / tiles_ + 1;
    FillLanes(item, first, end, scratch);
    Rank(item, first, end, scratch);
    for (int64_t i = first; i < end; ++i) {
      const Segment segment = SegmentAt(item.s, i);
      if (segment.ranked() == 0) continue;
      const float* energies = scratch.energies + (i - first) * keys_ + segment.first_key;
      keep(segment, energies, KeyListAt(item.frame.mask(), item.s, item.rows[0].head, i));
    }
  }

 private:
  Segment SegmentAt(const Sequence& s, int64_t i) const {
    return Segment::Of(call_.p, call_.g, call_.policy, s, tiles_, i);
  }

  // The mean query of each head of each segment, and how many keys it sees.
  void FillLanes(const Item& item, int64_t first, int64_t end, const Scratch& scratch) const {
    const int64_t d = call_.p.head_dim, head = item.rows[0].head * heads_;
    std::fill_n(scratch.panels, lanes_ * d, 0.f);
    std::fill_n(scratch.seen, lanes_, 0);
    for (int64_t lane = 0; lane < (end - first) * heads_; ++lane) {
      const Segment segment = SegmentAt(item.s, first + lane / heads_);
      if (segment.ranked() == 0) continue;
      std::fill_n(scratch.mean, d, 0.f);
      for (int64_t q = segment.begin; q < segment.end; q += kMeanRows) {
        const int64_t stop = std::min(q + kMeanRows, segment.end);
        kernels_.load_queries(call_.p, item.s, q, stop, head + lane % heads_, scratch.rows);
        kernels_.add_rows(scratch.rows, stop - q, d, scratch.mean);
      }
      FinishMean(scratch.mean, d, segment.end - segment.begin, call_.p.q.dtype);
      PutLane(scratch.mean, d, ExponentScale(call_.p), lane, scratch.panels);
      scratch.seen[lane] = static_cast<int32_t>(item.s.prefix + segment.end);
    }
  }

  // Leaves the energies of the segments' keys in their rows.
  void Rank(const Item& item, int64_t first, int64_t end, const Scratch& scratch) const {
    std::fill_n(scratch.largest, lanes_, kLeastScore);
    std::fill_n(scratch.sums, lanes_, 0.f);
    ForChunks(item, scratch, *std::max_element(scratch.seen, scratch.seen + lanes_),
              [&](const ScoreChunk& chunk) { kernels_.add_to_sums(chunk, scratch.largest, scratch.sums); });
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      scratch.largest[lane] = LaneReference(scratch.largest[lane], scratch.sums[lane], 1);
    }
    ForChunks(item, scratch, SegmentAt(item.s, end - 1).end_key, [&](const ScoreChunk& chunk) {
      kernels_.share(chunk, scratch.largest);
      const float each = 1 / static_cast<float>(heads_);
      for (int64_t i = 0; i < end - first; ++i) {
        float* energies = scratch.energies + i * keys_ + chunk.first;
        for (int64_t t = 0; t < chunk.count; ++t) {
          const float* shares = chunk.scores + t * lanes_ + i * heads_;
          float squares = 0;
          for (int h = 0; h < heads_; ++h) squares += shares[h] * shares[h];
          energies[t] = std::sqrt(squares * each);
        }
      }
    });
  }

  // Scores of keys [0, n), a chunk at a time.
  template <typename Body>
  void ForChunks(const Item& item, const Scratch& scratch, int64_t n, const Body& body) const {
    for (int64_t key = 0; key < n; key += kChunkKeys) {
      const int64_t count = std::min<int64_t>(kChunkKeys, n - key);
      kernels_.load_keys(call_.p, item.s, key, key + count, item.kv_head, scratch.rows);
      const ScoreChunk chunk{scratch.panels, scratch.rows, scratch.seen,  call_.p.head_dim, key,
                             count,          lanes_,       scratch.scores};
      kernels_.score(chunk);
      body(chunk);
    }
  }

  const SelectCall& call_;
  const VerticalSlashKernels& kernels_;
  const int64_t tiles_; // of a segment
  const int heads_;     // of a list
  const int64_t keys_;
  const int64_t segments_; // of an item, at most
  const int64_t lanes_;
};

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_KEY_RANKING_H_
