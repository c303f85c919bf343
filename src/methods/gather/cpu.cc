// Gather on the CPU. The mean queries of some segments, those of all heads of a list, are the lanes that pass over the
// keys together (cpu/vertical_slash/kernels.h), once: a key is loaded once for 32 mean queries, and ranking costs
// 1 / segment of dense attention's first product. What is left of the pass is one power for each key and lane, of the
// largest score up to then; a factor for each 64 keys and lane makes shares of them when the denominators are known.
// Keys whose energy is too little for the gain whatever else is left out are added up and never looked at again.
#include "core/key_list.h"
#include "cpu/frame.h"
#include "cpu/key_threshold.h"
#include "cpu/vertical_slash/kernels.h"
#include "cpu/vertical_slash/lanes.h"
#include "methods/gather/segment.h"

namespace flashprefill::methods::gather {
namespace {

constexpr int64_t kRowsAtOnce = 128;                  // query rows that are added up
constexpr int64_t kMostCandidates = int64_t{4} << 20; // per thread, as long as a segment's own are fewer

class Selection {
 public:
  struct Scratch {
    float* rows;     // [kRowsAtOnce][head_dim]: of queries, then of keys
    float* mean;     // [head_dim]
    float* panels;   // [lanes / 32][head_dim][32]
    float* powers;   // [keys, in whole chunks][lanes]: 2^(score - the largest of the lane up to this chunk)
    float* marks;    // [chunks][lanes]: those largest scores
    float* largest;  // [lanes]
    float* sums;     // [lanes]
    float* factors;  // [lanes]
    int32_t* seen;   // [lanes]
    float* chunk;    // [kChunkKeys][stride_]: energies
    float* energies; // [segments_][keys]: of the keys that are not out
    int32_t* left;   // [segments_][keys]: these keys
    uint64_t* ranks; // [keys]
  };

  // A segment's keys that are not out.
  struct Candidates {
    Segment segment;
    float* energies;
    int32_t* keys;
    int64_t count = 0;
    double below = 0; // the sum of the others' energies
  };

  explicit Selection(const cpu::SelectCall& call)
      : call_(call),
        policy_(reinterpret_cast<const fp_gather&>(call.policy)),
        kernels_(cpu::VerticalSlashKernelsFor(call.exec)),
        tiles_(SegmentTiles(policy_.segment, call.g)),
        heads_(call.g.heads_per_tile),
        keys_(std::max<int64_t>(1, call.p.max_seqlen_k)),
        chunks_(DivUp<int64_t>(keys_, cpu::kChunkKeys)),
        segments_(std::clamp<int64_t>(kMostCandidates / keys_, 1, std::max(1, cpu::kPanelRows / heads_))),
        lanes_(DivUp<int64_t>(segments_ * heads_, cpu::kPanelRows) * cpu::kPanelRows),
        stride_(DivUp<int64_t>(segments_, cpu::kVectorPad) * cpu::kVectorPad) {}

  cpu::ItemShape Shape() const { return {.rows = segments_ * tiles_}; }
  void Take(Workspace&, int64_t) {}
  Scratch TakeScratch(Workspace& memory) const {
    const int64_t d = call_.p.head_dim;
    return {.rows = memory.Take<float>(kRowsAtOnce * d),
            .mean = memory.Take<float>(d),
            .panels = memory.Take<float>(lanes_ * d),
            .powers = memory.Take<float>(chunks_ * cpu::kChunkKeys * lanes_ + cpu::kVectorPad),
            .marks = memory.Take<float>(chunks_ * lanes_),
            .largest = memory.Take<float>(lanes_),
            .sums = memory.Take<float>(lanes_),
            .factors = memory.Take<float>(lanes_ + cpu::kVectorPad),
            .seen = memory.Take<int32_t>(lanes_),
            .chunk = memory.Take<float>(cpu::kChunkKeys * stride_),
            .energies = memory.Take<float>(segments_ * keys_),
            .left = memory.Take<int32_t>(segments_ * keys_),
            .ranks = memory.Take<uint64_t>(keys_)};
  }
  void Describe(const cpu::SelectFrame&) const {}

  void Choose(const cpu::Item& item, const Scratch& scratch) const {
    for (const cpu::MaskRow& row : item.rows) {
      const int64_t window = SegmentAt(item.s, row.m / tiles_).window;
      for (int64_t block = window; block < row.tile.visible; ++block) SetBit(row.bits, block);
    }
    // Rows come from the last tile on, and in whole segments.
    const int64_t first = item.rows.back().m / tiles_, end = item.rows.front().m / tiles_ + 1;
    FillLanes(item, first, end, scratch);
    Raise(item, scratch);
    Candidates found[cpu::kPanelRows];
    for (int64_t i = 0; i < end - first; ++i) {
      found[i] = {SegmentAt(item.s, first + i), scratch.energies + i * keys_, scratch.left + i * keys_};
    }
    Sift(std::span(found, end - first), scratch);
    for (int64_t i = 0; i < end - first; ++i) {
      const Candidates& some = found[i];
      if (some.segment.ranked() == 0) continue;
      const cpu::KeyThreshold threshold =
          cpu::FindKeyThreshold(some.energies, some.count, RuleFor(some.segment, some.below), scratch.ranks);
      int32_t* list = KeyListAt(item.frame.mask(), item.s, item.rows[0].head, first + i);
      cpu::TakeKeys(some.energies, some.keys, some.count, threshold, list + 2);
      list[0] = static_cast<int32_t>(threshold.kept);
      list[1] = static_cast<int32_t>(threshold.wanted);
    }
  }

 private:
  Segment SegmentAt(const Sequence& s, int64_t i) const {
    return Segment::Of(call_.p, call_.g, call_.policy, s, tiles_, i);
  }

  cpu::KeyRule RuleFor(const Segment& segment, double below) const {
    cpu::KeyRule rule;
    rule.below = below;
    rule.room = std::min<int64_t>(policy_.max_keys, call_.p.max_seqlen_k);
    rule.gain = double{policy_.gain} / kGainKeys;
    if (std::isnan(policy_.gain)) rule.count = BudgetKeys(policy_, segment.ranked());
    return rule;
  }

  // A key with less than this is not kept. By gain, what is left is at most the root of the number of heads: a key's
  // energy is at most the sum of its shares over that root, and a head's shares sum to one. By budget, any may be kept.
  float Floor() const {
    if (std::isnan(policy_.gain)) return 0;
    return 0.999f * static_cast<float>(policy_.gain / kGainKeys / std::sqrt(std::sqrt(static_cast<double>(heads_))));
  }

  // The mean query of each head of each segment, and how many keys it sees. Lanes are head by head.
  void FillLanes(const cpu::Item& item, int64_t first, int64_t end, const Scratch& scratch) const {
    const int64_t d = call_.p.head_dim, head = item.rows[0].head * heads_;
    std::fill_n(scratch.panels, lanes_ * d, 0.f);
    std::fill_n(scratch.seen, lanes_, 0);
    for (int64_t lane = 0; lane < segments_ * heads_; ++lane) {
      const int64_t i = first + lane % segments_;
      if (i >= end) continue;
      const Segment segment = SegmentAt(item.s, i);
      if (segment.ranked() == 0) continue;
      std::fill_n(scratch.mean, d, 0.f);
      for (int64_t q = segment.begin; q < segment.end; q += kRowsAtOnce) {
        const int64_t stop = std::min(q + kRowsAtOnce, segment.end);
        kernels_.load_queries(call_.p, item.s, q, stop, head + lane / segments_, scratch.rows);
        kernels_.add_rows(scratch.rows, stop - q, d, scratch.mean);
      }
      cpu::FinishMean(scratch.mean, d, segment.end - segment.begin, call_.p.q.dtype);
      cpu::PutLane(scratch.mean, d, ExponentScale(call_.p), lane, scratch.panels);
      scratch.seen[lane] = static_cast<int32_t>(item.s.prefix + segment.end);
    }
  }

  // The one pass over the keys.
  void Raise(const cpu::Item& item, const Scratch& scratch) const {
    std::fill_n(scratch.largest, lanes_, cpu::kLeastScore);
    std::fill_n(scratch.sums, lanes_, 0.f);
    const int64_t n = *std::max_element(scratch.seen, scratch.seen + lanes_);
    for (int64_t key = 0; key < n; key += cpu::kChunkKeys) {
      const int64_t count = std::min<int64_t>(cpu::kChunkKeys, n - key);
      kernels_.load_keys(call_.p, item.s, key, key + count, item.kv_head, scratch.rows);
      const cpu::ScoreChunk chunk{scratch.panels,
                                  scratch.rows,
                                  scratch.seen,
                                  call_.p.head_dim,
                                  key,
                                  count,
                                  lanes_,
                                  scratch.powers + key * lanes_};
      kernels_.score(chunk);
      kernels_.raise(chunk, scratch.largest, scratch.sums);
      std::copy_n(scratch.largest, lanes_, scratch.marks + key / cpu::kChunkKeys * lanes_);
    }
  }

  // Writes down the energies of the segments' keys that may be kept, and adds up the others.
  void Sift(std::span<Candidates> found, const Scratch& scratch) const {
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      scratch.largest[lane] = cpu::LaneReference(scratch.largest[lane], scratch.sums[lane], 1);
    }
    std::fill_n(scratch.factors + lanes_, cpu::kVectorPad, 0.f);
    const cpu::LaneGroups groups{heads_, segments_, lanes_, scratch.factors, stride_};
    const float floor = Floor();
    int64_t n = 0; // segments of the dense tail, the last ones, have none
    for (const Candidates& some : found) n = some.segment.ranked() > 0 ? some.segment.end_key : n;
    for (int64_t key = 0; key < n; key += cpu::kChunkKeys) {
      const int64_t count = std::min<int64_t>(cpu::kChunkKeys, n - key);
      std::copy_n(scratch.marks + key / cpu::kChunkKeys * lanes_, lanes_, scratch.factors);
      kernels_.share({nullptr, nullptr, nullptr, 0, 0, 1, lanes_, scratch.factors}, scratch.largest);
      kernels_.root_mean_squares(groups, scratch.powers + key * lanes_, count, scratch.chunk);
      for (Candidates& some : found) {
        const int64_t begin = std::max(key, some.segment.first_key), end = std::min(key + count, some.segment.end_key);
        if (begin < end) Add(scratch.chunk + (begin - key) * stride_ + (&some - found.data()), begin, end, floor, some);
      }
    }
  }

  // Keys [begin, end), whose energies are `stride_` apart. Nothing branches on what may be kept: it is hard to foresee.
  void Add(const float* energy, int64_t begin, int64_t end, float floor, Candidates& to) const {
    int64_t count = to.count;
    float below = 0;
    for (int64_t key = begin; key < end; ++key, energy += stride_) {
      const bool may = *energy >= floor;
      to.energies[count] = *energy;
      to.keys[count] = static_cast<int32_t>(key);
      count += may;
      below += may ? 0.f : *energy;
    }
    to.count = count;
    to.below += double{below};
  }

  const cpu::SelectCall& call_;
  const fp_gather& policy_;
  const cpu::VerticalSlashKernels& kernels_;
  const int64_t tiles_; // of a segment
  const int heads_;     // of a list
  const int64_t keys_;
  const int64_t chunks_;
  const int64_t segments_; // of an item, at most
  const int64_t lanes_;
  const int64_t stride_; // of a key's energies
};

} // namespace

extern const cpu::Selector kCpu = cpu::SelectorBy<Selection>();

} // namespace flashprefill::methods::gather
