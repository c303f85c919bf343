// How select divides its work. Two phases: *describe* reads K once and keeps some floats a block, *score* reads Q once,
// a tile at a time, and ends with the tile's bits: no score outlives its tile. Both are memory-bound where queries are
// pooled, so what matters is that every row is read once, in long runs, by whichever thread is free.
//
// Sequences go through both phases in waves, as many together as their panels fit into the workspace: a long sequence
// alone, hundreds of short ones at once. A wave's work is one list of units for each phase, taken from a shared
// counter; the tiles with the most blocks come first, so that the last ones to be taken are small. Sketch's metric, for
// which one query row a tile is read, comes before both.
#include "cpu/select.h"

#include <cmath>

#include "core/backend.h"
#include "core/half.h"
#include "core/threads.h"
#include "cpu/policies.h"
#include "cpu/select_keep.h"
#include "cpu/select_kernels.h"
#include "cpu/select_plan.h"
#include "cpu/select_vertical_slash.h"
#include "cpu/work.h"

namespace flashprefill::cpu {
namespace {

constexpr int64_t kRun = 16;        // blocks a unit of describing: 16 columns of a panel are whole cache lines
constexpr int64_t kWavePanels = 16; // short sequences share waves of so many panels (of each KV head)

// Where a sequence's work begins in its wave. One entry more holds the wave's totals.
struct Share {
  int64_t unit;  // of describing
  int64_t item;  // of scoring
  int64_t panel; // in the wave's panels
  int heads_per_unit;
};

// A thread's own memory.
struct Scratch {
  float* rows;       // [max_rows][depth]
  float* largest;    // [lists][blocks, in whole panels]
  float* sums;       // the same
  uint64_t* keys;    // [blocks]
  int32_t* visible;  // [max_rows]: blocks that a row sees
  int32_t* in_panel; // [max_rows]: those of one panel
  float* describe;
};

struct Memory {
  Share* shares; // [batch + 1]
  float* metric; // Sketch: [batch][kv_heads][head_dim]
  float* panels; // [capacity][kv_heads]
  std::byte* scratch;
  int64_t capacity;
  size_t scratch_bytes; // of one thread
  int threads;
  size_t bytes;
};

Scratch ScratchAt(const Problem& p, const SelectPlan& plan, std::byte* base, size_t* bytes) {
  Workspace parts(base);
  const int64_t blocks = DivUp<int64_t>(DivUp<int64_t>(p.max_seqlen_k, plan.g.block_size), kPanelBlocks) * kPanelBlocks;
  const int lists = plan.shared ? 1 : plan.heads_per_item;
  Scratch s{};
  s.rows = parts.Take<float>(int64_t{plan.max_rows} * plan.depth);
  s.largest = parts.Take<float>(lists * blocks);
  s.sums = parts.Take<float>(lists * blocks);
  s.keys = parts.Take<uint64_t>(blocks);
  s.visible = parts.Take<int32_t>(plan.max_rows);
  s.in_panel = parts.Take<int32_t>(plan.max_rows);
  s.describe = parts.Take<float>(DescribeScratch(p, plan));
  if (bytes) *bytes = parts.used();
  return s;
}

Memory MemoryOf(const Problem& p, const SelectPlan& plan, const Policy& policy, const Exec& exec, void* workspace) {
  Memory m{};
  int64_t longest = 0, all = 0, items = 0;
  for (int b = 0; b < p.batch; ++b) {
    const Sequence s = SequenceOf(p, b);
    items += plan.g.Tiles(s) * p.kv_heads * plan.Splits();
    if (!plan.scores || KeepsEverything(p, plan.g, policy, s)) continue;
    longest = std::max(longest, plan.Panels(s));
    all += plan.Panels(s);
  }
  m.capacity = std::max(longest, std::min(all, kWavePanels));
  m.threads = static_cast<int>(std::clamp<int64_t>(items, 1, ThreadCount(exec.threads)));
  Workspace parts(workspace);
  m.shares = parts.Take<Share>(p.batch + 1);
  if (plan.sketch) m.metric = parts.Take<float>(int64_t{p.batch} * p.kv_heads * p.head_dim);
  if (m.capacity > 0) {
    m.panels = parts.Take<float>(m.capacity * p.kv_heads * plan.panel_floats);
    ScratchAt(p, plan, nullptr, &m.scratch_bytes);
    m.scratch = parts.Take<std::byte>(static_cast<int64_t>(m.scratch_bytes) * m.threads);
  }
  m.bytes = parts.used();
  return m;
}

class Selection {
 public:
  Selection(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace)
      : p_(p),
        policy_(policy),
        mask_(mask),
        plan_(SelectPlan::Of(p, policy)),
        memory_(MemoryOf(p, plan_, policy, exec, workspace)),
        kernels_(SelectKernelsFor(exec)) {}

  void Run() {
    if (plan_.sketch) {
      ForAll(memory_.threads, int64_t{p_.batch} * p_.kv_heads, [&](int64_t i, int) {
        const Sequence s = SequenceOf(p_, static_cast<int>(i / p_.kv_heads));
        MetricOf(s, static_cast<int>(i % p_.kv_heads), memory_.metric + i * p_.head_dim);
      });
    }
    for (int begin = 0; begin < p_.batch;) {
      const int end = PlanWave(begin);
      const Share& total = memory_.shares[end];
      ForAll(memory_.threads, total.unit, [&](int64_t i, int thread) { Describe(begin, end, i, thread); });
      ForAll(memory_.threads, total.item, [&](int64_t i, int thread) { SelectItem(begin, end, i, thread); });
      begin = end;
    }
  }

 private:
  // What a dimension counts in the distance of a key of this head from its block's mean: 1, or with query_metric the
  // sum of squares that the last row of each tile of its query heads has there. What is not finite is left out.
  void MetricOf(const Sequence& s, int kv_head, float* metric) const {
    std::fill_n(metric, p_.head_dim, plan_.query_metric ? 0.f : 1.f);
    if (!plan_.query_metric) return;
    for (int64_t m = 0; m < plan_.g.Tiles(s); ++m) {
      const int64_t row = std::min<int64_t>((m + 1) * plan_.g.tile_tokens, s.q_len) - 1;
      for (int h = kv_head * plan_.g.group; h < (kv_head + 1) * plan_.g.group; ++h) {
        const int64_t offset = RowOffset(p_, p_.q.stride, s, row, h);
        for (int64_t d = 0; d < p_.head_dim; ++d) {
          const float x = LoadElement(p_.q.data, p_.q.dtype, offset + d * p_.q.stride[3]);
          if (std::isfinite(x)) metric[d] += x * x;
        }
      }
    }
  }

  // Fills the shares of the sequences from begin on whose panels fit together, and returns the first that is left.
  int PlanWave(int begin) {
    Share next{};
    int b = begin;
    for (; b < p_.batch; ++b) {
      const Sequence s = SequenceOf(p_, b);
      const bool forced = KeepsEverything(p_, plan_.g, policy_, s);
      const bool scored = plan_.scores && !forced;
      const int64_t panels = scored ? plan_.Panels(s) : 0;
      if (next.panel + panels > memory_.capacity) break;
      // Neighbouring heads together are longer runs of memory, fewer heads are more units: some six for each thread.
      const int64_t runs = DivUp(plan_.g.Blocks(s), kRun);
      next.heads_per_unit =
          static_cast<int>(std::clamp<int64_t>(runs * p_.kv_heads / (6 * memory_.threads), 1, p_.kv_heads));
      memory_.shares[b] = next;
      if (scored) next.unit += runs * DivUp(p_.kv_heads, next.heads_per_unit);
      next.item += plan_.g.Tiles(s) * p_.kv_heads * plan_.Splits();
      next.panel += panels;
      if (mask_.fallback) {
        mask_.fallback[b] = policy_.kind == FP_DENSE ? FP_FALLBACK_DENSE : forced ? FP_FALLBACK_SHORT : FP_SELECTED;
      }
    }
    memory_.shares[b] = next;
    return b;
  }

  // The sequence of a wave whose share holds entry i of the list that `first` names.
  int Owner(int begin, int end, int64_t Share::*first, int64_t i) const {
    const Share* owner = std::upper_bound(memory_.shares + begin, memory_.shares + end, i,
                                          [&](int64_t value, const Share& share) { return value < share.*first; });
    return static_cast<int>(owner - memory_.shares) - 1;
  }

  Scratch ScratchOf(int thread) const {
    return ScratchAt(p_, plan_, memory_.scratch + memory_.scratch_bytes * thread, nullptr);
  }

  float* PanelsOf(const Share& share) const { return memory_.panels + share.panel * p_.kv_heads * plan_.panel_floats; }

  void Describe(int begin, int end, int64_t i, int thread) const {
    const int b = Owner(begin, end, &Share::unit, i);
    const Share& share = memory_.shares[b];
    const Sequence s = SequenceOf(p_, b);
    const int64_t runs = DivUp(plan_.g.Blocks(s), kRun), unit = i - share.unit;
    const int64_t block = unit % runs * kRun;
    const int head = static_cast<int>(unit / runs) * share.heads_per_unit;
    kernels_.describe(p_, plan_, s, block, std::min(block + kRun, plan_.g.Blocks(s)), head,
                      std::min(head + share.heads_per_unit, p_.kv_heads),
                      memory_.metric + int64_t{b} * p_.kv_heads * p_.head_dim, PanelsOf(share),
                      ScratchOf(thread).describe);
  }

  // One tile of the query heads [begin, end) of one KV head.
  struct Item {
    Sequence s;
    int64_t m;
    Tile tile;
    int kv_head;
    int heads_begin, heads_end;
  };

  Item ItemOf(const Share& share, int b, int64_t i) const {
    Item item{};
    item.s = SequenceOf(p_, b);
    const int64_t tiles = plan_.g.Tiles(item.s), at = i - share.item;
    item.m = tiles - 1 - at % tiles;
    item.tile = plan_.g.TileOf(p_, item.s, item.m);
    item.kv_head = static_cast<int>(at / tiles / plan_.Splits());
    const int split = static_cast<int>(at / tiles % plan_.Splits()) * plan_.heads_per_item;
    item.heads_begin = item.kv_head * plan_.g.group + split;
    item.heads_end = std::min(item.heads_begin + plan_.heads_per_item, (item.kv_head + 1) * plan_.g.group);
    return item;
  }

  void SelectItem(int begin, int end, int64_t i, int thread) const {
    const int b = Owner(begin, end, &Share::item, i);
    const Share& share = memory_.shares[b];
    const Item item = ItemOf(share, b, i);
    const int64_t window = item.tile.diagonal - std::max(0, policy_.window_blocks - 1);
    const bool all = policy_.kind == FP_DENSE || InDenseTail(plan_.g, policy_, item.s, item.m) ||
                     policy_.sink_blocks >= window; // which holds for every tile of a sequence that is not scored
    const int lists = plan_.shared ? 1 : item.heads_end - item.heads_begin;
    Scratch scratch{};
    int64_t stride = 0, scored = 0;
    if (!all && plan_.scores) {
      scratch = ScratchOf(thread);
      stride = plan_.Panels(item.s) * kPanelBlocks;
      scored = Score(item, PanelsOf(share), lists, stride, scratch);
    }
    for (int list = 0; list < lists; ++list) {
      const int64_t index = plan_.g.Row(item.s, plan_.shared ? item.kv_head : item.heads_begin + list, item.m);
      uint64_t* row = mask_.bits + index * plan_.g.words;
      FillRow(row, plan_.g.words, all ? item.tile.visible : 0);
      if (scored > 0) {
        float* sums = scratch.sums + list * stride;
        const float largest = kernels_.energies(scored, scratch.largest + list * stride, sums);
        KeepByEnergy(plan_, sums, scored, largest, scratch.keys, row);
      }
      if (!all) KeepForced(policy_, item.tile, row);
      if (mask_.counts) mask_.counts[index] = CountBits(row, plan_.g.words);
    }
  }

  // Sums up the energies of all lists of an item. Returns how many blocks any of its rows sees.
  int64_t Score(const Item& item, const float* panels, int lists, int64_t stride, const Scratch& scratch) const {
    const int64_t tokens = item.tile.end - item.tile.begin;
    const int rows_per_head = plan_.RowsPerHead(tokens);
    const int rows = rows_per_head * (item.heads_end - item.heads_begin);
    const int rows_per_list = rows / lists;
    int64_t scored = 0;
    for (int r = 0; r < rows; ++r) {
      const int64_t last = std::min<int64_t>((r % rows_per_head + 1) * int64_t{plan_.query_pool}, tokens) - 1;
      const int64_t visible = plan_.Visible(item.s, item.tile, item.tile.begin + last);
      scratch.visible[r] = static_cast<int32_t>(visible);
      scored = std::max(scored, visible);
    }
    if (scored == 0) return 0;
    kernels_.load_rows(p_, plan_, item.s, item.tile.begin, item.tile.end, item.heads_begin, item.heads_end,
                       scratch.rows);
    panels += item.kv_head * plan_.Panels(item.s) * plan_.panel_floats;
    for (int64_t block = 0; block < scored; block += kPanelBlocks, panels += plan_.panel_floats) {
      for (int r = 0; r < rows; ++r) {
        scratch.in_panel[r] = static_cast<int32_t>(std::clamp<int64_t>(scratch.visible[r] - block, 0, kPanelBlocks));
      }
      for (int list = 0; list < lists; ++list) {
        float* largest = scratch.largest + list * stride + block;
        float* sums = scratch.sums + list * stride + block;
        std::fill_n(largest, kPanelBlocks, kNothing);
        std::fill_n(sums, kPanelBlocks, 0.f);
        const int first = list * rows_per_list;
        kernels_.score(p_, plan_, panels, scratch.rows + int64_t{first} * plan_.depth, rows_per_list,
                       scratch.in_panel + first, largest, sums);
      }
    }
    return scored;
  }

  const Problem& p_;
  const Policy& policy_;
  BlockMask& mask_;
  const SelectPlan plan_;
  const Memory memory_;
  const SelectKernels& kernels_;
};

} // namespace

size_t SelectWorkspace(const Problem& p, const Policy& policy, const Exec& exec) {
  if (ChoosesByHead(policy)) return SelectVerticalSlashWorkspace(p, policy, exec);
  if (policy.kind == FP_XATTENTION) return XAttentionWorkspace(p, policy, exec);
  if (policy.kind == FP_RRATTENTION) return RRAttentionWorkspace(p, policy, exec);
  if (policy.kind == FP_SPARGE_ATTN) return SpargeAttnWorkspace(p, policy, exec);
  if (policy.kind == FP_PRISM) return PrismWorkspace(p, policy, exec);
  if (policy.kind == FP_SAMPLE_ATTENTION) return SampleAttentionWorkspace(p, policy, exec);
  return MemoryOf(p, SelectPlan::Of(p, policy), policy, exec, nullptr).bytes;
}

void Select(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace) {
  if (ChoosesByHead(policy)) return SelectVerticalSlash(p, policy, exec, mask, workspace);
  if (policy.kind == FP_XATTENTION) return SelectXAttention(p, policy, exec, mask, workspace);
  if (policy.kind == FP_RRATTENTION) return SelectRRAttention(p, policy, exec, mask, workspace);
  if (policy.kind == FP_SPARGE_ATTN) return SelectSpargeAttn(p, policy, exec, mask, workspace);
  if (policy.kind == FP_PRISM) return SelectPrism(p, policy, exec, mask, workspace);
  if (policy.kind == FP_SAMPLE_ATTENTION) return SelectSampleAttention(p, policy, exec, mask, workspace);
  Selection(p, policy, exec, mask, workspace).Run();
}

} // namespace flashprefill::cpu
