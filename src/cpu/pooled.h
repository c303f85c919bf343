// What SpargeAttn and Prism share on the CPU: mean keys of blocks in the panels of FlashPrefill's select, the mean
// query of a tile, the softmax numerators of one against the other, and how the work is divided. Each of the two says
// what it needs to know of keys beforehand, and what it keeps.
#ifndef FLASHPREFILL_CPU_POOLED_H_
#define FLASHPREFILL_CPU_POOLED_H_

#include <algorithm>

#include "core/backend.h"
#include "cpu/select_keep.h"
#include "cpu/select_kernels.h"
#include "cpu/work.h"

namespace flashprefill::cpu {

class Pooled {
 public:
  // A thread's own memory.
  struct Scratch {
    float *describe, *means, *row, *largest, *energies;
    uint64_t *keys, *picked;
    float* own; // the policy's
  };

  // A part of a sequence: key blocks [begin, end) of one KV head.
  struct Run {
    int b;
    Sequence s;
    int kv_head;
    int64_t begin, end;
  };

  // A tile of one KV head's query heads.
  struct Item {
    int b;
    Sequence s;
    int kv_head;
    Tile tile;
  };

  // The policy takes what else it needs from `parts` afterwards. own: floats of a thread's scratch memory for it.
  Pooled(const Problem& p, const Policy& policy, const Exec& exec, int64_t own, Workspace& parts)
      : p_(p), policy_(policy), plan_(SelectPlan::Of(p, policy)), kernels_(SelectKernelsFor(exec)), own_(own) {
    plan_.query_pool = kTileRows;
    Share total{};
    for (int b = 1; b <= p.batch; ++b) total = ShareOf(b, total);
    blocks_ = total.block;
    threads_ = static_cast<int>(std::clamp<int64_t>(std::max(total.run, total.item), 1, ThreadCount(exec.threads)));
    shares_ = parts.Take<Share>(p.batch + 1);
    panels_ = parts.Take<float>(total.panel * p.kv_heads * plan_.panel_floats);
    Layout(nullptr, &scratch_bytes_);
    scratch_ = parts.Take<std::byte>(static_cast<int64_t>(scratch_bytes_) * threads_);
  }

  // Key blocks of all sequences that are selected for, of one KV head.
  int64_t blocks() const { return blocks_; }
  const SelectPlan& plan() const { return plan_; }
  Scratch ScratchOf(int thread) const { return Layout(scratch_ + scratch_bytes_ * thread, nullptr); }

  // Where the blocks of a KV head of a sequence begin in arrays of blocks() * kv_heads entries.
  int64_t BlocksOf(int b, int kv_head) const {
    return shares_[b].block * p_.kv_heads + kv_head * (shares_[b + 1].block - shares_[b].block);
  }
  float* PanelsOf(int b, const Sequence& s, int kv_head) const {
    return panels_ + (shares_[b].panel * p_.kv_heads + kv_head * plan_.Panels(s)) * plan_.panel_floats;
  }

  // To be called first: writes all mean keys.
  void Describe() const {
    shares_[0] = {};
    for (int b = 1; b <= p_.batch; ++b) shares_[b] = ShareOf(b, shares_[b - 1]);
    ForRuns([&](const Run& r, const Scratch& scratch) {
      kernels_.describe(p_, plan_, r.s, r.begin, r.end, r.kv_head, r.kv_head + 1, /*metric=*/nullptr,
                        PanelsOf(r.b, r.s, 0), scratch.describe);
    });
  }

  // work(run, scratch) for runs of blocks of all sequences that are selected for.
  template <typename Work>
  void ForRuns(const Work& work) const {
    ForAll(threads_, shares_[p_.batch].run, [&](int64_t i, int thread) {
      Run r{};
      r.b = Owner(&Share::run, i);
      r.s = SequenceOf(p_, r.b);
      const int64_t runs = RunsOf(r.s), run = i - shares_[r.b].run;
      r.kv_head = static_cast<int>(run / runs);
      r.begin = run % runs * kRun;
      r.end = std::min(r.begin + kRun, plan_.g.Blocks(r.s));
      work(r, ScratchOf(thread));
    });
  }

  // Writes the mask. choose(item, head, mean, scratch, row) sets the bits of one head's tile; mean is the mean query
  // times softmax_scale log2(e).
  template <typename Choose>
  void ForTiles(BlockMask& mask, const Choose& choose) const {
    ForAll(threads_, shares_[p_.batch].item, [&](int64_t i, int thread) {
      Item item{};
      item.b = Owner(&Share::item, i);
      item.s = SequenceOf(p_, item.b);
      const int64_t tiles = plan_.g.Tiles(item.s), at = i - shares_[item.b].item;
      const int64_t m = tiles - 1 - at % tiles; // the longest rows first
      item.kv_head = static_cast<int>(at / tiles);
      item.tile = plan_.g.TileOf(p_, item.s, m);
      const int64_t window = item.tile.diagonal - std::max(0, policy_.window_blocks - 1);
      const bool all = InDenseTail(plan_.g, policy_, item.s, m) || policy_.sink_blocks >= window;
      const Scratch scratch = ScratchOf(thread);
      const int first = item.kv_head * plan_.g.group;
      if (!all) {
        kernels_.load_rows(p_, plan_, item.s, item.tile.begin, item.tile.end, first, first + plan_.g.group,
                           scratch.means);
      }
      for (int head = 0; head < plan_.g.group; ++head) {
        const int64_t index = plan_.g.Row(item.s, first + head, m);
        uint64_t* row = mask.bits + index * plan_.g.words;
        FillRow(row, plan_.g.words, all ? item.tile.visible : 0);
        if (!all) {
          choose(item, first + head, scratch.means + int64_t{head} * p_.head_dim, scratch, row);
          KeepForced(policy_, item.tile, row);
        }
        if (mask.counts) mask.counts[index] = CountBits(row, plan_.g.words);
      }
    });
    for (int b = 0; mask.fallback && b < p_.batch; ++b) {
      mask.fallback[b] = KeepsEverything(p_, plan_.g, policy_, SequenceOf(p_, b)) ? FP_FALLBACK_SHORT : FP_SELECTED;
    }
  }

  // scratch.energies[block] = 2^(row . mean - the largest of them) for the tile's visible blocks that `counts`.
  template <typename Counts>
  void Score(const Item& item, const float* row, const Scratch& scratch, const Counts& counts) const {
    const float* panel = PanelsOf(item.b, item.s, item.kv_head);
    for (int64_t block = 0; block < item.tile.visible; block += kPanelBlocks, panel += plan_.panel_floats) {
      std::fill_n(scratch.largest + block, kPanelBlocks, kNothing);
      std::fill_n(scratch.energies + block, kPanelBlocks, 0.f);
      const int32_t seen = static_cast<int32_t>(std::min<int64_t>(item.tile.visible - block, kPanelBlocks));
      kernels_.score(p_, plan_, panel, row, 1, &seen, scratch.largest + block, scratch.energies + block);
    }
    for (int64_t block = 0; block < item.tile.visible; ++block) {
      if (!counts(block)) scratch.largest[block] = kNothing, scratch.energies[block] = 0;
    }
    kernels_.energies(item.tile.visible, scratch.largest, scratch.energies);
  }

 private:
  static constexpr int64_t kRun = 16; // blocks

  // Where a sequence's work begins. One entry more holds the totals.
  struct Share {
    int64_t run, item, panel, block;
  };

  int64_t RunsOf(const Sequence& s) const { return DivUp(plan_.g.Blocks(s), kRun); }

  // The share of sequence b, from that of the one before it.
  Share ShareOf(int b, const Share& before) const {
    const Sequence s = SequenceOf(p_, b - 1);
    Share next = before;
    next.item += plan_.g.Tiles(s) * p_.kv_heads;
    if (KeepsEverything(p_, plan_.g, policy_, s)) return next;
    next.run += RunsOf(s) * p_.kv_heads;
    next.panel += plan_.Panels(s);
    next.block += plan_.g.Blocks(s);
    return next;
  }

  int Owner(int64_t Share::*first, int64_t i) const {
    const Share* owner = std::upper_bound(shares_, shares_ + p_.batch, i,
                                          [&](int64_t value, const Share& share) { return value < share.*first; });
    return static_cast<int>(owner - shares_) - 1;
  }

  Scratch Layout(std::byte* base, size_t* bytes) const {
    const int64_t blocks =
        DivUp<int64_t>(DivUp<int64_t>(p_.max_seqlen_k, plan_.g.block_size), kPanelBlocks) * kPanelBlocks;
    Workspace parts(base);
    Scratch s{};
    s.describe = parts.Take<float>(DescribeScratch(p_, plan_));
    s.means = parts.Take<float>(int64_t{plan_.g.group} * p_.head_dim);
    s.row = parts.Take<float>(p_.head_dim);
    s.largest = parts.Take<float>(blocks);
    s.energies = parts.Take<float>(blocks);
    s.keys = parts.Take<uint64_t>(blocks);
    s.picked = parts.Take<uint64_t>(plan_.g.words);
    s.own = parts.Take<float>(own_);
    if (bytes) *bytes = parts.used();
    return s;
  }

  const Problem& p_;
  const Policy& policy_;
  SelectPlan plan_;
  const SelectKernels& kernels_;
  const int64_t own_;
  int64_t blocks_;
  int threads_;
  Share* shares_;
  float* panels_;
  std::byte* scratch_;
  size_t scratch_bytes_;
};

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_POOLED_H_
