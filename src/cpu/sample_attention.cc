// SampleAttention (arXiv 2406.15486) on the CPU. Its sampled rows are rows of a grid whose cells are single keys (see
// strided_kernels.h), 32 of a segment at a time. Masses go to one of eight pairs of sums (by key block, by distance)
// for each head, panel i to pair i mod 8, and the pairs are added up in order, so that the same bits come out whatever
// the threads. The columns and diagonals of a head then make all of its tiles' rows without another look at a key.
#include <algorithm>

#include "core/backend.h"
#include "cpu/policies.h"
#include "cpu/select_keep.h"
#include "cpu/select_kernels.h"
#include "cpu/strided_kernels.h"
#include "cpu/work.h"
#include "methods/sample_attention/row_sample.h"

namespace flashprefill::cpu {
namespace {

constexpr int64_t kPairs = 8;       // of sums: as many threads may work on one head
constexpr int64_t kKeysAtOnce = 64; // that are brought to fp32 before they are scored

// Where a sequence's work begins. One entry more holds the totals.
struct Share {
  int64_t unit;  // a head's panels of one pair
  int64_t block; // in `sums`, of each head and pair
};

struct Scratch {
  float *panel, *row, *keys, *largest, *sums, *visible;
  uint64_t *ranks, *columns, *diagonals;
  float* total;
};

class SampleSelection {
 public:
  SampleSelection(const Problem& p, const Policy& policy, const Exec& exec, void* workspace)
      : p_(p),
        policy_(reinterpret_cast<const fp_sample_attention&>(policy)),
        kernels_(StridedKernelsFor(exec)),
        g_(Geometry::Of(p, policy)),
        panels_a_segment_(DivUp(policy_.sample_rows, kStridedLanes)) {
    Share total{};
    for (int b = 1; b <= p.batch; ++b) total = ShareOf(b, total);
    threads_ = static_cast<int>(
        std::clamp<int64_t>(std::max<int64_t>(total.unit, int64_t{p.batch} * p.q_heads), 1, ThreadCount(exec.threads)));
    Workspace parts(workspace);
    shares_ = parts.Take<Share>(p.batch + 1);
    sums_ = parts.Take<float>(total.block * p.q_heads * kPairs * 2);
    Layout(nullptr, &scratch_bytes_);
    scratch_ = parts.Take<std::byte>(static_cast<int64_t>(scratch_bytes_) * threads_);
    bytes_ = parts.used();
  }

  size_t bytes() const { return bytes_; }

  void Run(BlockMask& mask) const {
    shares_[0] = {};
    for (int b = 1; b <= p_.batch; ++b) shares_[b] = ShareOf(b, shares_[b - 1]);
    ForAll(threads_, shares_[p_.batch].unit, [&](int64_t i, int thread) { Sample(i, ScratchOf(thread)); });
    ForAll(threads_, int64_t{p_.batch} * p_.q_heads, [&](int64_t i, int thread) {
      SelectHead(static_cast<int>(i / p_.q_heads), static_cast<int>(i % p_.q_heads), ScratchOf(thread), mask);
    });
    for (int b = 0; mask.fallback && b < p_.batch; ++b) {
      mask.fallback[b] = KeepsEverything(p_, g_, policy_.common, SequenceOf(p_, b)) ? FP_FALLBACK_SHORT : FP_SELECTED;
    }
  }

 private:
  // The share of sequence b, from that of the one before it.
  Share ShareOf(int b, const Share& before) const {
    const Sequence s = SequenceOf(p_, b - 1);
    if (KeepsEverything(p_, g_, policy_.common, s)) return before;
    return {before.unit + p_.q_heads * kPairs, before.block + g_.Blocks(s)};
  }

  Scratch Layout(std::byte* base, size_t* bytes) const {
    const int64_t blocks = DivUp<int64_t>(p_.max_seqlen_k, g_.block_size);
    Workspace parts(base);
    Scratch s{};
    s.panel = parts.Take<float>(int64_t{p_.head_dim} * kStridedLanes);
    s.row = parts.Take<float>(p_.head_dim);
    s.keys = parts.Take<float>(kKeysAtOnce * p_.head_dim);
    s.largest = parts.Take<float>(blocks * kStridedLanes);
    s.sums = parts.Take<float>(blocks * kStridedLanes);
    s.visible = parts.Take<float>(kStridedLanes);
    s.ranks = parts.Take<uint64_t>(blocks);
    s.columns = parts.Take<uint64_t>(g_.words);
    s.diagonals = parts.Take<uint64_t>(g_.words);
    s.total = parts.Take<float>(blocks);
    if (bytes) *bytes = parts.used();
    return s;
  }

  Scratch ScratchOf(int thread) const { return Layout(scratch_ + scratch_bytes_ * thread, nullptr); }

  // Two lists of `blocks` sums, by key block and by distance.
  float* SumsOf(int b, int64_t blocks, int64_t head, int64_t pair) const {
    return sums_ + (shares_[b].block * p_.q_heads * kPairs + (head * kPairs + pair) * blocks) * 2;
  }

  void Sample(int64_t i, const Scratch& scratch) const {
    const Share* owner = std::upper_bound(shares_, shares_ + p_.batch, i,
                                          [](int64_t value, const Share& share) { return value < share.unit; });
    const int b = static_cast<int>(owner - shares_) - 1;
    const Sequence s = SequenceOf(p_, b);
    const int head = static_cast<int>((i - shares_[b].unit) / kPairs);
    const int64_t pair = (i - shares_[b].unit) % kPairs, blocks = g_.Blocks(s);
    float* columns = SumsOf(b, blocks, head, pair);
    std::fill_n(columns, 2 * blocks, 0.f);
    const methods::sample_attention::RowSample sample = methods::sample_attention::RowSample::Of(policy_, s);
    for (int64_t panel = pair; panel < sample.segments * panels_a_segment_; panel += kPairs) {
      const int64_t segment = panel / panels_a_segment_;
      const int64_t begin = sample.Begin(segment) + panel % panels_a_segment_ * kStridedLanes;
      const int64_t end = std::min(begin + kStridedLanes, sample.End(segment));
      if (begin < end) SamplePanel(s, head, begin, end, scratch, columns, columns + blocks);
    }
  }

  void SamplePanel(const Sequence& s, int head, int64_t begin, int64_t end, const Scratch& scratch, float* columns,
                   float* diagonals) const {
    const int64_t d = p_.head_dim, size = g_.block_size, seen = s.prefix + end;
    const float factor = static_cast<float>(p_.softmax_scale * 1.4426950408889634);
    std::fill_n(scratch.panel, d * kStridedLanes, 0.f);
    std::fill_n(scratch.visible, kStridedLanes, 0.f);
    for (int64_t i = begin; i < end; ++i) {
      kernels_.load_query(p_, s, i, head, factor, scratch.row);
      for (int64_t e = 0; e < d; ++e) scratch.panel[e * kStridedLanes + i - begin] = scratch.row[e];
      scratch.visible[i - begin] = static_cast<float>(s.prefix + i + 1);
    }
    const int64_t blocks = DivUp(seen, size);
    for (int64_t block = 0; block < blocks; ++block) {
      float* largest = scratch.largest + block * kStridedLanes;
      float* sums = scratch.sums + block * kStridedLanes;
      std::fill_n(largest, kStridedLanes, kNothing);
      std::fill_n(sums, kStridedLanes, 0.f);
      const int64_t last = std::min((block + 1) * size, seen);
      for (int64_t key = block * size; key < last; key += kKeysAtOnce) {
        const int64_t n = std::min(kKeysAtOnce, last - key);
        kernels_.load_keys(p_, s, head / g_.group, key, key + n, scratch.keys);
        kernels_.score(scratch.panel, scratch.keys, d, d, key, static_cast<int>(n), scratch.visible, largest, sums);
      }
    }
    kernels_.normalise(blocks, scratch.largest, scratch.sums);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t own = (s.prefix + i) / size;
      for (int64_t block = 0; block <= own; ++block) {
        const float share = scratch.sums[block * kStridedLanes + i - begin];
        columns[block] += share;
        diagonals[own - block] += share;
      }
    }
  }

  // The items that a head keeps, of one list of sums.
  void KeepItems(int b, int64_t blocks, int head, int64_t offset, const Scratch& scratch, uint64_t* bits) const {
    std::fill_n(scratch.total, blocks, 0.f);
    for (int64_t pair = 0; pair < kPairs; ++pair) {
      const float* sums = SumsOf(b, blocks, head, pair) + offset;
      for (int64_t i = 0; i < blocks; ++i) scratch.total[i] += sums[i];
    }
    FillRow(bits, g_.words, 0);
    TopP(scratch.total, blocks, policy_.coverage, scratch.ranks, bits);
  }

  void SelectHead(int b, int head, const Scratch& scratch, BlockMask& mask) const {
    const Sequence s = SequenceOf(p_, b);
    const int64_t blocks = g_.Blocks(s);
    const bool forced = KeepsEverything(p_, g_, policy_.common, s);
    if (!forced) {
      KeepItems(b, blocks, head, 0, scratch, scratch.columns);
      KeepItems(b, blocks, head, blocks, scratch, scratch.diagonals);
    }
    for (int64_t m = 0; m < g_.Tiles(s); ++m) {
      const Tile tile = g_.TileOf(p_, s, m);
      const int64_t index = g_.Row(s, head, m);
      uint64_t* row = mask.bits + index * g_.words;
      const bool all = forced || InDenseTail(g_, policy_.common, s, m);
      FillRow(row, g_.words, all ? tile.visible : 0);
      if (!all) {
        for (int64_t w = 0; w < g_.words; ++w) row[w] = VisibleWord(scratch.columns, w, tile.visible);
        for (int64_t own = tile.diagonal; own < tile.visible; ++own) {
          for (int64_t distance = 0; distance <= own; ++distance) {
            if (TestBit(scratch.diagonals, distance)) SetBit(row, own - distance);
          }
        }
        for (int64_t block = methods::sample_attention::WindowBegin(policy_, s, tile, g_.block_size);
             block < tile.visible; ++block) {
          SetBit(row, block);
        }
        KeepForced(policy_.common, tile, row);
      }
      if (mask.counts) mask.counts[index] = CountBits(row, g_.words);
    }
  }

  const Problem& p_;
  const fp_sample_attention& policy_;
  const StridedKernels& kernels_;
  const Geometry g_;
  const int panels_a_segment_;
  Share* shares_;
  float* sums_;
  std::byte* scratch_;
  size_t scratch_bytes_, bytes_;
  int threads_;
};

} // namespace

size_t SampleAttentionWorkspace(const Problem& p, const Policy& policy, const Exec& exec) {
  return SampleSelection(p, policy, exec, nullptr).bytes();
}

void SelectSampleAttention(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace) {
  SampleSelection(p, policy, exec, workspace).Run(mask);
}

} // namespace flashprefill::cpu
