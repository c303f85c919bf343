// S2O on the CPU. Keys are ranked as cpu/key_ranking.h says. The rows that say when to stop are lanes too: their sums
// begin with the keys in the tile's blocks, and take the ranked keys 128 at a time. That costs stop_rows / segment of
// the products that attention has over the same keys.
#include <bit>

#include "core/stop_rows.h"
#include "cpu/key_ranking.h"
#include "cpu/key_threshold.h"

namespace flashprefill::methods::s2o {
namespace {

class Selection {
 public:
  struct Scratch {
    cpu::KeyRanking::Scratch ranking;
    float* panels;  // [lanes / 32][head_dim][32]
    float* scores;  // [kChunkKeys][lanes]
    float* largest; // [lanes]: of what is summed up so far, and of a group
    float* sums;
    float* group_largest;
    float* group_sums;
    int32_t* seen; // [lanes]
  };

  explicit Selection(const cpu::SelectCall& call)
      : call_(call),
        policy_(reinterpret_cast<const fp_s2o&>(call.policy)),
        kernels_(cpu::VerticalSlashKernelsFor(call.exec)),
        ranking_(call, policy_.segment),
        heads_(call.g.heads_per_tile),
        lanes_(DivUp<int64_t>(heads_ * MostRows(), cpu::kPanelRows) * cpu::kPanelRows) {}

  cpu::ItemShape Shape() const { return ranking_.Shape(); }
  void Take(Workspace&, int64_t) {}
  Scratch TakeScratch(Workspace& memory) const {
    return {.ranking = ranking_.TakeScratch(memory),
            .panels = memory.Take<float>(lanes_ * call_.p.head_dim),
            .scores = memory.Take<float>(cpu::kChunkKeys * lanes_),
            .largest = memory.Take<float>(lanes_),
            .sums = memory.Take<float>(lanes_),
            .group_largest = memory.Take<float>(lanes_),
            .group_sums = memory.Take<float>(lanes_),
            .seen = memory.Take<int32_t>(lanes_)};
  }
  void Describe(const cpu::SelectFrame&) const {}

  void Choose(const cpu::Item& item, const Scratch& scratch) const {
    ranking_.Choose(item, scratch.ranking, [&](const Segment& segment, const float* energies, int32_t* list) {
      const int64_t room = Sort(segment, energies, list + 2, scratch.ranking.ranks);
      SumBlocks(item, segment, scratch);
      bool stopped = false;
      const int64_t kept = Stop(item, segment, room, scratch, stopped);
      for (int64_t rank = 0; rank < kept; ++rank) list[2 + rank] = KeyOf(segment, scratch.ranking.ranks[rank]);
      std::sort(list + 2, list + 2 + kept);
      list[0] = static_cast<int32_t>(kept);
      list[1] = static_cast<int32_t>(kept + (!stopped && kept < segment.ranked()));
    });
  }

 private:
  // Rows of a head that decide, in any segment, at most.
  int64_t MostRows() const {
    return std::min<int64_t>({policy_.stop_rows, std::max<int64_t>(1, call_.p.max_seqlen_q),
                              SegmentTiles(policy_.segment, call_.g) * call_.g.tile_tokens});
  }

  static int32_t KeyOf(const Segment& segment, uint64_t rank) {
    return static_cast<int32_t>(segment.first_key + static_cast<uint32_t>(~rank));
  }

  // Leaves the best keys in ranks, in order: the bits of a key's energy, and below them its index's complement. Returns
  // how many: as many as a list holds. `keys` is memory for these.
  int64_t Sort(const Segment& segment, const float* energies, int32_t* keys, uint64_t* ranks) const {
    const int64_t room = std::min<int64_t>({policy_.max_keys, call_.p.max_seqlen_k, segment.ranked()});
    cpu::KeyRule rule;
    rule.count = rule.room = room;
    const cpu::KeyThreshold threshold = cpu::FindKeyThreshold(energies, segment.ranked(), rule, ranks);
    cpu::TakeKeys(energies, nullptr, segment.ranked(), threshold, keys);
    for (int64_t i = 0; i < room; ++i) {
      const uint64_t bits = std::bit_cast<uint32_t>(energies[keys[i]]);
      ranks[i] = bits << 32 | static_cast<uint32_t>(~keys[i]);
    }
    std::sort(ranks, ranks + room, std::greater<>());
    return room;
  }

  // The rows become lanes, and the keys in their blocks are summed up.
  void SumBlocks(const cpu::Item& item, const Segment& segment, const Scratch& scratch) const {
    const int64_t d = call_.p.head_dim, rows = StopRows(policy_.stop_rows, segment), head = item.rows[0].head * heads_;
    std::fill_n(scratch.panels, lanes_ * d, 0.f);
    std::fill_n(scratch.seen, lanes_, 0);
    std::fill_n(scratch.largest, lanes_, cpu::kLeastScore);
    std::fill_n(scratch.sums, lanes_, 0.f);
    for (int64_t lane = 0; lane < heads_ * rows; ++lane) {
      const int64_t i = StopRow(segment, lane / heads_, rows);
      kernels_.load_queries(call_.p, item.s, i, i + 1, head + lane % heads_, scratch.ranking.rows);
      cpu::PutLane(scratch.ranking.rows, d, ExponentScale(call_.p), lane, scratch.panels);
      scratch.seen[lane] = static_cast<int32_t>(item.s.prefix + i + 1);
    }
    const int64_t last = item.s.prefix + segment.end;
    for (const auto& [begin, end] : {std::pair(int64_t{0}, segment.first_key), std::pair(segment.end_key, last)}) {
      for (int64_t key = begin; key < end; key += cpu::kChunkKeys) {
        const int64_t stop = std::min<int64_t>(key + cpu::kChunkKeys, end);
        kernels_.load_keys(call_.p, item.s, key, stop, item.kv_head, scratch.ranking.rows);
        const cpu::ScoreChunk chunk = ChunkOf(scratch, key, stop - key);
        kernels_.score(chunk);
        kernels_.add_to_sums(chunk, scratch.largest, scratch.sums);
      }
    }
    for (int64_t lane = 0; lane < heads_ * rows; ++lane) scratch.seen[lane] = cpu::kChunkKeys; // of ranked keys all
  }

  // Takes ranked keys in groups. Returns how many, and whether it stopped before the last of `room`.
  int64_t Stop(const cpu::Item& item, const Segment& segment, int64_t room, const Scratch& scratch,
               bool& stopped) const {
    const int64_t d = call_.p.head_dim;
    int below = 0;
    for (int64_t first = 0; first < room; first += kGroupKeys) {
      const int64_t end = std::min(first + kGroupKeys, room);
      std::fill_n(scratch.group_largest, lanes_, cpu::kLeastScore);
      std::fill_n(scratch.group_sums, lanes_, 0.f);
      for (int64_t rank = first; rank < end; rank += cpu::kChunkKeys) {
        const int64_t count = std::min<int64_t>(cpu::kChunkKeys, end - rank);
        for (int64_t k = 0; k < count; ++k) {
          const int64_t key = KeyOf(segment, scratch.ranking.ranks[rank + k]);
          kernels_.load_keys(call_.p, item.s, key, key + 1, item.kv_head, scratch.ranking.rows + k * d);
        }
        const cpu::ScoreChunk chunk = ChunkOf(scratch, 0, count);
        kernels_.score(chunk);
        kernels_.add_to_sums(chunk, scratch.group_largest, scratch.group_sums);
      }
      below = Ratio(scratch) < policy_.tau ? below + 1 : 0;
      if (below == kGroupsBelow) {
        stopped = true;
        return end;
      }
    }
    return room;
  }

  // Adds a group to the lanes' sums. Returns the mean of what it adds over what there was.
  float Ratio(const Scratch& scratch) const {
    float ratios = 0, counted = 0;
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      float &largest = scratch.largest[lane], &sum = scratch.sums[lane];
      const float group_largest = scratch.group_largest[lane], added = scratch.group_sums[lane];
      if (sum == 0 && added == 0) continue;
      if (added > 0) {
        ratios += added / sum * std::exp2(group_largest - largest);
        const float most = std::max(largest, group_largest);
        sum = sum * std::exp2(largest - most) + added * std::exp2(group_largest - most);
        largest = most;
      }
      counted += 1;
    }
    return counted == 0 ? 0 : ratios / counted;
  }

  // Scores of `count` keys in `rows`; the first one's number is that which `seen` counts by.
  cpu::ScoreChunk ChunkOf(const Scratch& scratch, int64_t first, int64_t count) const {
    return {scratch.panels, scratch.ranking.rows, scratch.seen, call_.p.head_dim, first, count, lanes_, scratch.scores};
  }

  const cpu::SelectCall& call_;
  const fp_s2o& policy_;
  const cpu::VerticalSlashKernels& kernels_;
  const cpu::KeyRanking ranking_;
  const int heads_; // of a list
  const int64_t lanes_;
};

} // namespace

extern const cpu::Selector kCpu = cpu::SelectorBy<Selection>();

} // namespace flashprefill::methods::s2o
