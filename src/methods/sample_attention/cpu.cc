// SampleAttention (arXiv 2406.15486) on the CPU. Its sampled rows are strided rows whose cells are single keys (see
// cpu/strided/kernels.h), 32 of a segment at a time. Masses go to one of eight pairs of sums (by key block, by
// distance) for each head, panel i to pair i mod 8, and the pairs are added up in order, so that the same bits come out
// whatever the threads. The verticals and slashes of a head then make all of its tiles' rows without another look at a
// key.
#include <algorithm>

#include "cpu/energies/kernels.h"
#include "cpu/frame.h"
#include "cpu/strided/kernels.h"
#include "cpu/top_p.h"
#include "methods/sample_attention/row_sample.h"

namespace flashprefill::methods::sample_attention {
namespace {

using cpu::kStridedLanes;

constexpr int64_t kPairs = 8;       // of sums: as many threads may work on one head
constexpr int64_t kKeysAtOnce = 64; // that are brought to fp32 before they are scored

class Selection {
 public:
  struct Scratch {
    float *panel, *row, *keys, *largest, *sums, *visible, *total;
    uint64_t *ranks, *verticals, *slashes;
  };

  explicit Selection(const cpu::SelectCall& call)
      : call_(call),
        policy_(reinterpret_cast<const fp_sample_attention&>(call.policy)),
        kernels_(cpu::StridedKernelsFor(call.exec)),
        panels_per_segment_(DivUp(policy_.sample_rows, kStridedLanes)) {}

  cpu::ItemShape Shape() const { return {.units = int64_t{call_.p.batch} * call_.p.q_heads * kPairs}; }
  void Take(Workspace& memory, int64_t panels) {
    sums_ = memory.Take<float>(panels * cpu::kPanelBlocks * call_.p.q_heads * kPairs * 2);
  }

  Scratch TakeScratch(Workspace& memory) const {
    const int64_t blocks = DivUp<int64_t>(call_.p.max_seqlen_k, call_.g.block_size), d = call_.p.head_dim;
    return {.panel = memory.Take<float>(d * kStridedLanes),
            .row = memory.Take<float>(d),
            .keys = memory.Take<float>(kKeysAtOnce * d),
            .largest = memory.Take<float>(blocks * kStridedLanes),
            .sums = memory.Take<float>(blocks * kStridedLanes),
            .visible = memory.Take<float>(kStridedLanes),
            .total = memory.Take<float>(blocks),
            .ranks = memory.Take<uint64_t>(blocks),
            .verticals = memory.Take<uint64_t>(call_.g.words),
            .slashes = memory.Take<uint64_t>(call_.g.words)};
  }

  // Sums up the masses of each head, one pair of sums per unit.
  void Describe(const cpu::SelectFrame& frame) const {
    frame.ForUnits([&](const Sequence&) { return call_.p.q_heads * kPairs; },
                   [&](const Sequence& s, int64_t unit, Workspace own) { SumPair(frame, s, unit, TakeScratch(own)); });
  }

  void Choose(const cpu::Item& item, const Scratch& scratch) const {
    const int64_t head = item.rows[0].head;
    Keep(item, head, 0, scratch, scratch.verticals);
    Keep(item, head, call_.g.Blocks(item.s), scratch, scratch.slashes);
    for (const cpu::MaskRow& row : item.rows) {
      std::copy_n(scratch.verticals, call_.g.words, row.bits);
      for (int64_t own = row.tile.diagonal; own < row.tile.visible; ++own) {
        for (int64_t distance = 0; distance <= own; ++distance) {
          if (TestBit(scratch.slashes, distance)) SetBit(row.bits, own - distance);
        }
      }
      const int64_t window = WindowBegin(policy_, item.s, row.tile, call_.g.block_size);
      for (int64_t block = window; block < row.tile.visible; ++block) SetBit(row.bits, block);
    }
  }

 private:
  // Two lists of sums, one per key block each: by key block and by distance. unit: head * kPairs + pair.
  float* SumsOf(const cpu::SelectFrame& frame, const Sequence& s, int64_t unit) const {
    return sums_ + frame.Panel(s, unit, call_.p.q_heads * kPairs) * cpu::kPanelBlocks * 2;
  }

  void SumPair(const cpu::SelectFrame& frame, const Sequence& s, int64_t unit, const Scratch& scratch) const {
    const int64_t blocks = call_.g.Blocks(s);
    float* verticals = SumsOf(frame, s, unit);
    std::fill_n(verticals, 2 * blocks, 0.f);
    const RowSample sample = SampleOf(policy_, s);
    for (int64_t panel = unit % kPairs; panel < sample.segments * panels_per_segment_; panel += kPairs) {
      const int64_t segment = panel / panels_per_segment_;
      const int64_t begin = sample.Begin(segment) + panel % panels_per_segment_ * kStridedLanes;
      const int64_t end = std::min(begin + kStridedLanes, sample.End(segment));
      if (begin >= end) continue;
      SamplePanel(s, static_cast<int>(unit / kPairs), begin, end, scratch, verticals, verticals + blocks);
    }
  }

  // Adds the masses of query rows [begin, end), at most kStridedLanes of them.
  void SamplePanel(const Sequence& s, int head, int64_t begin, int64_t end, const Scratch& scratch, float* verticals,
                   float* slashes) const {
    const int64_t d = call_.p.head_dim, size = call_.g.block_size, seen = s.prefix + end;
    std::fill_n(scratch.panel, d * kStridedLanes, 0.f);
    std::fill_n(scratch.visible, kStridedLanes, 0.f);
    for (int64_t i = begin; i < end; ++i) {
      kernels_.load_query(call_.p, s, i, head, ExponentScale(call_.p), scratch.row);
      for (int64_t e = 0; e < d; ++e) scratch.panel[e * kStridedLanes + i - begin] = scratch.row[e];
      scratch.visible[i - begin] = static_cast<float>(s.prefix + i + 1);
    }
    const int64_t blocks = DivUp(seen, size);
    for (int64_t block = 0; block < blocks; ++block) {
      float* largest = scratch.largest + block * kStridedLanes;
      float* sums = scratch.sums + block * kStridedLanes;
      std::fill_n(largest, kStridedLanes, cpu::kNothing);
      std::fill_n(sums, kStridedLanes, 0.f);
      const int64_t last = std::min((block + 1) * size, seen);
      for (int64_t key = block * size; key < last; key += kKeysAtOnce) {
        const int64_t n = std::min(kKeysAtOnce, last - key);
        kernels_.load_keys(call_.p, s, head / call_.g.group, key, key + n, scratch.keys);
        kernels_.score(scratch.panel, scratch.keys, d, d, key, static_cast<int>(n), scratch.visible, largest, sums);
      }
    }
    kernels_.normalise(blocks, scratch.largest, scratch.sums);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t own = (s.prefix + i) / size;
      for (int64_t block = 0; block <= own; ++block) {
        const float share = scratch.sums[block * kStridedLanes + i - begin];
        verticals[block] += share;
        slashes[own - block] += share;
      }
    }
  }

  // Sets the bits of what a head keeps of the list of sums at `offset`.
  void Keep(const cpu::Item& item, int64_t head, int64_t offset, const Scratch& scratch, uint64_t* bits) const {
    const int64_t blocks = call_.g.Blocks(item.s);
    std::fill_n(scratch.total, blocks, 0.f);
    for (int64_t pair = 0; pair < kPairs; ++pair) {
      const float* sums = SumsOf(item.frame, item.s, head * kPairs + pair) + offset;
      for (int64_t i = 0; i < blocks; ++i) scratch.total[i] += sums[i];
    }
    FillRow(bits, call_.g.words, 0);
    cpu::TopP(scratch.total, blocks, policy_.coverage, scratch.ranks, bits);
  }

  const cpu::SelectCall& call_;
  const fp_sample_attention& policy_;
  const cpu::StridedKernels& kernels_;
  const int panels_per_segment_;
  float* sums_ = nullptr;
};

} // namespace

extern const cpu::Selector kCpu = cpu::SelectorBy<Selection>();

} // namespace flashprefill::methods::sample_attention
