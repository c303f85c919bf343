// See strided.h. A unit of work is as many lists (a tile of a query head) of one KV head as fill the lanes of a
// panel: the heads of the group and then neighbouring tiles, which see nearly the same keys. All keys that any of them
// sees pass by once. What outlives a block of keys is a maximum and a sum for each lane: blocks x 32 x 8 bytes a
// thread.
#include "cpu/strided.h"

#include <algorithm>
#include <numeric>

#include "core/backend.h"
#include "cpu/select_keep.h"
#include "cpu/select_kernels.h"
#include "cpu/work.h"

namespace flashprefill::cpu {
namespace {

constexpr int kCellsAtOnce = 8; // that are brought to fp32 before they are scored
constexpr int64_t kRun = 256;   // cells whose means are one unit of work

// Where a sequence's work begins. One entry more holds the totals.
struct Share {
  int64_t run;  // of cells to be averaged
  int64_t unit; // of lists to be selected for
  int64_t cell; // in `means`, of each KV head
};

struct Scratch {
  float *panel, *row, *cells, *largest, *sums, *mass, *visible;
  uint64_t* keys;
};

struct Memory {
  Share* shares; // [batch + 1]
  float* means;  // [cells of all sequences][kv_heads][depth]
  std::byte* scratch;
  size_t scratch_bytes;
  int threads;
  size_t bytes;
};

class StridedSelection {
 public:
  StridedSelection(const StridedMethod& method, const Problem& p, const Policy& policy, const Exec& exec,
                   void* workspace)
      : method_(method),
        p_(p),
        policy_(policy),
        kernels_(StridedKernelsFor(exec)),
        g_(Geometry::Of(p, policy)),
        cells_a_tile_(kTileRows / method.stride),
        cells_a_block_(g_.block_size / method.stride),
        lists_a_unit_(kStridedLanes / cells_a_tile_) {
    Plan(exec, workspace);
  }

  size_t bytes() const { return memory_.bytes; }

  void Run(BlockMask& mask) const {
    for (int b = 0; b <= p_.batch; ++b) memory_.shares[b] = ShareOf(b, b > 0 ? &memory_.shares[b - 1] : nullptr);
    const Share& total = memory_.shares[p_.batch];
    ForAll(memory_.threads, total.run, [&](int64_t i, int) { Average(i); });
    ForAll(memory_.threads, total.unit, [&](int64_t i, int thread) { SelectUnit(i, ScratchOf(thread), mask); });
    for (int b = 0; mask.fallback && b < p_.batch; ++b) {
      mask.fallback[b] = KeepsEverything(p_, g_, policy_, SequenceOf(p_, b)) ? FP_FALLBACK_SHORT : FP_SELECTED;
    }
  }

 private:
  // Floats from one cell of keys to the next. A cell is often 4 KiB, and eight of them side by side would all lie in
  // the same eight lines of L1.
  int64_t Pitch() const { return method_.depth + 16; }
  int64_t Cells(const Sequence& s) const { return DivUp<int64_t>(s.k_len, method_.stride); }
  int64_t Units(const Sequence& s) const { return DivUp(g_.Tiles(s) * g_.group, int64_t{lists_a_unit_}); }
  // Cells of a sequence that are averaged.
  int64_t Averaged(const Sequence& s) const {
    return method_.cell_means && !KeepsEverything(p_, g_, policy_, s) ? Cells(s) : 0;
  }

  // The share of sequence b, from that of the one before it.
  Share ShareOf(int b, const Share* before) const {
    if (b == 0) return {};
    const Sequence s = SequenceOf(p_, b - 1);
    return {before->run + DivUp(Averaged(s), kRun) * p_.kv_heads, before->unit + Units(s) * p_.kv_heads,
            before->cell + Averaged(s)};
  }

  int Owner(int64_t Share::*first, int64_t i) const {
    const Share* owner = std::upper_bound(memory_.shares, memory_.shares + p_.batch, i,
                                          [&](int64_t value, const Share& share) { return value < share.*first; });
    return static_cast<int>(owner - memory_.shares) - 1;
  }

  void Plan(const Exec& exec, void* workspace) {
    Share total{};
    for (int b = 1; b <= p_.batch; ++b) total = ShareOf(b, &total);
    memory_.threads = static_cast<int>(std::clamp<int64_t>(total.unit, 1, ThreadCount(exec.threads)));
    Workspace parts(workspace);
    memory_.shares = parts.Take<Share>(p_.batch + 1);
    memory_.means = parts.Take<float>(total.cell * p_.kv_heads * method_.depth);
    Layout(nullptr, &memory_.scratch_bytes);
    memory_.scratch = parts.Take<std::byte>(static_cast<int64_t>(memory_.scratch_bytes) * memory_.threads);
    memory_.bytes = parts.used();
  }

  Scratch Layout(std::byte* base, size_t* bytes) const {
    const int64_t blocks = DivUp<int64_t>(p_.max_seqlen_k, g_.block_size);
    Workspace parts(base);
    Scratch s{};
    s.panel = parts.Take<float>(method_.depth * kStridedLanes);
    s.row = parts.Take<float>(p_.head_dim);
    s.cells = parts.Take<float>(method_.cell_means ? 0 : kCellsAtOnce * Pitch());
    s.largest = parts.Take<float>(blocks * kStridedLanes);
    s.sums = parts.Take<float>(blocks * kStridedLanes);
    s.mass = parts.Take<float>(blocks);
    s.visible = parts.Take<float>(kStridedLanes);
    s.keys = parts.Take<uint64_t>(blocks);
    if (bytes) *bytes = parts.used();
    return s;
  }

  Scratch ScratchOf(int thread) const { return Layout(memory_.scratch + memory_.scratch_bytes * thread, nullptr); }

  // The means of a KV head of a sequence.
  float* MeansOf(int b, int kv_head) const {
    const Share* share = memory_.shares + b;
    const int64_t cells = share[1].cell - share->cell;
    return memory_.means + (share->cell * p_.kv_heads + kv_head * cells) * method_.depth;
  }

  void Average(int64_t i) const {
    const int b = Owner(&Share::run, i);
    const Sequence s = SequenceOf(p_, b);
    const int64_t runs = DivUp(Cells(s), kRun), run = i - memory_.shares[b].run;
    const int head = static_cast<int>(run / runs);
    const int64_t cell = run % runs * kRun;
    kernels_.mean_keys(p_, s, head, method_.stride, cell * method_.stride, std::min(kRun, Cells(s) - cell),
                       MeansOf(b, head) + cell * method_.depth);
  }

  struct List {
    int head;
    int64_t m;
    Tile tile;
    bool all; // nothing is to be scored: everything is kept
  };

  List ListOf(const Sequence& s, int kv_head, int64_t list) const {
    List l{};
    l.head = kv_head * g_.group + static_cast<int>(list % g_.group);
    l.m = g_.Tiles(s) - 1 - list / g_.group; // the longest rows first
    l.tile = g_.TileOf(p_, s, l.m);
    const int64_t window = l.tile.diagonal - std::max(0, policy_.window_blocks - 1);
    l.all = InDenseTail(g_, policy_, s, l.m) || policy_.sink_blocks >= window;
    return l;
  }

  void SelectUnit(int64_t i, const Scratch& scratch, BlockMask& mask) const {
    const int b = Owner(&Share::unit, i);
    const Sequence s = SequenceOf(p_, b);
    const int64_t unit = i - memory_.shares[b].unit, units = Units(s);
    const int kv_head = static_cast<int>(unit / units);
    const int64_t begin = unit % units * lists_a_unit_;
    const int64_t end = std::min(begin + lists_a_unit_, g_.Tiles(s) * g_.group);

    const int64_t blocks = Score(b, s, kv_head, begin, end, scratch);
    for (int64_t list = begin; list < end; ++list) {
      const List l = ListOf(s, kv_head, list);
      const int64_t index = g_.Row(s, l.head, l.m);
      uint64_t* row = mask.bits + index * g_.words;
      FillRow(row, g_.words, l.all ? l.tile.visible : 0);
      if (!l.all) {
        const float* lanes = scratch.sums + (list - begin) * cells_a_tile_;
        for (int64_t block = 0; block < l.tile.visible; ++block, lanes += kStridedLanes) {
          scratch.mass[block] = block < blocks ? std::accumulate(lanes, lanes + cells_a_tile_, 0.f) : 0.f;
        }
        method_.keep(policy_, l.tile, l.head, scratch.mass, scratch.keys, row);
        KeepForced(policy_, l.tile, row);
      }
      if (mask.counts) mask.counts[index] = CountBits(row, g_.words);
    }
  }

  // Leaves the share of each block in each lane in scratch.sums, and returns how many blocks any lane sees.
  int64_t Score(int b, const Sequence& s, int kv_head, int64_t begin, int64_t end, const Scratch& scratch) const {
    std::fill_n(scratch.panel, method_.depth * kStridedLanes, 0.f);
    std::fill_n(scratch.visible, kStridedLanes, 0.f);
    int64_t most = 0;
    for (int64_t list = begin; list < end; ++list) {
      const List l = ListOf(s, kv_head, list);
      int64_t lane = (list - begin) * cells_a_tile_;
      for (int64_t q = l.tile.begin; !l.all && q < l.tile.end; q += method_.stride, ++lane) {
        const int64_t seen =
            method_.fill_lane(p_, policy_, kernels_, s, l.tile, q, l.head, scratch.row, scratch.panel + lane);
        scratch.visible[lane] = static_cast<float>(seen);
        most = std::max(most, seen);
      }
    }
    const int64_t blocks = DivUp(most, int64_t{cells_a_block_});
    for (int64_t block = 0; block < blocks; ++block) {
      float* largest = scratch.largest + block * kStridedLanes;
      float* sums = scratch.sums + block * kStridedLanes;
      std::fill_n(largest, kStridedLanes, kNothing);
      std::fill_n(sums, kStridedLanes, 0.f);
      const int64_t first = block * cells_a_block_, last = std::min(first + cells_a_block_, most);
      if (method_.cell_means) {
        kernels_.score(scratch.panel, MeansOf(b, kv_head) + first * method_.depth, method_.depth, method_.depth, first,
                       static_cast<int>(last - first), scratch.visible, largest, sums);
        continue;
      }
      for (int64_t cell = first; cell < last; cell += kCellsAtOnce) {
        const int n = static_cast<int>(std::min<int64_t>(kCellsAtOnce, last - cell));
        for (int c = 0; c < n; ++c) {
          float* into = scratch.cells + c * Pitch();
          const int64_t key = (cell + c) * method_.stride, keys = std::min<int64_t>(method_.stride, s.k_len - key);
          kernels_.load_keys(p_, s, kv_head, key, key + keys, into);
          std::fill(into + keys * p_.head_dim, into + method_.depth, 0.f); // past the end
        }
        kernels_.score(scratch.panel, scratch.cells, Pitch(), method_.depth, cell, n, scratch.visible, largest, sums);
      }
    }
    kernels_.normalise(blocks, scratch.largest, scratch.sums);
    return blocks;
  }

  const StridedMethod& method_;
  const Problem& p_;
  const Policy& policy_;
  const StridedKernels& kernels_;
  const Geometry g_;
  const int cells_a_tile_, cells_a_block_, lists_a_unit_;
  Memory memory_{};
};

} // namespace

size_t StridedWorkspace(const StridedMethod& method, const Problem& p, const Policy& policy, const Exec& exec) {
  return StridedSelection(method, p, policy, exec, nullptr).bytes();
}

void StridedSelect(const StridedMethod& method, const Problem& p, const Policy& policy, const Exec& exec,
                   BlockMask& mask, void* workspace) {
  StridedSelection(method, p, policy, exec, workspace).Run(mask);
}

} // namespace flashprefill::cpu
