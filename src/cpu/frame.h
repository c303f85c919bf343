// The frame of the CPU's select: everything that is the same for all methods. It divides the work, cuts scratch memory,
// and finishes each row of the mask: what is kept whole, forced blocks, counts, fallbacks. A method is a class M with
//
//     explicit M(const SelectCall& call);
//     ItemShape Shape() const;                       how rows of the mask become items of work
//     void Take(Workspace& memory, int64_t panels);  memory that the threads share, for waves of so many panels
//     M::Scratch TakeScratch(Workspace& memory) const;           a thread's own memory
//     void Describe(const SelectFrame& frame);       looks at the keys of a wave: any number of ForUnits
//     void Choose(const Item& item, const M::Scratch& scratch) const;    sets bits in an item's rows
//
// and SelectorBy<M>() is its row in the table. Choose finds its rows empty. It may set bits of rows that are kept whole
// and bits past a row's last visible block: they are overwritten and cleared.
//
// Sequences go through both phases in waves, as many together as their panels fit into the workspace: a long sequence
// alone, hundreds of short ones at once. A phase is one list of units, taken from a shared counter by whichever thread
// is free; a unit's arithmetic is one thread's, in a fixed order, so the bits do not depend on the number of threads.
#ifndef FLASHPREFILL_CPU_FRAME_H_
#define FLASHPREFILL_CPU_FRAME_H_

#include <algorithm>
#include <limits>
#include <span>

#include "core/backend.h"
#include "core/types.h"
#include "cpu/selector.h"
#include "cpu/work.h"

namespace flashprefill::cpu {

constexpr int kPanelBlocks = 32;   // key blocks per panel, the unit of memory that belongs to a sequence
constexpr int64_t kRunBlocks = 16; // key blocks per unit of Describe: 16 columns of a panel are whole cache lines

// One call of select.
struct SelectCall {
  const Problem& p;
  const Policy& policy;
  const Exec& exec;
  const Geometry g;

  int64_t Panels(const Sequence& s) const { return DivUp<int64_t>(g.Blocks(s), kPanelBlocks); }
  // Blocks of the longest sequence, in whole panels.
  int64_t MaxBlocks() const {
    return DivUp<int64_t>(DivUp<int64_t>(p.max_seqlen_k, g.block_size), kPanelBlocks) * kPanelBlocks;
  }
  // Units of a phase over runs of blocks of single KV heads: an upper bound.
  int64_t MaxRuns() const { return int64_t{p.batch} * p.kv_heads * DivUp(MaxBlocks(), kRunBlocks); }
};

// A sequence's rows of the mask, listed: mask heads in groups of `heads`, in a group tile by tile from the last one on
// (the longest rows first), in a tile head by head. Items are runs of that list.
struct ItemShape {
  static constexpr int64_t kAll = std::numeric_limits<int64_t>::max();
  int heads = 1;
  bool one_tile = false;      // an item's rows are all of one tile; else all of one group of heads
  int64_t rows = kAll;        // per item, at most: fewer in the first item of a list
  int64_t units = 0;          // of the longest phase of Describe, an upper bound: more threads are of no use
  int64_t wave_panels = kAll; // short sequences share waves of so many panels
};

// One row of the mask: tile m of a mask head.
struct MaskRow {
  int64_t head, m, index; // index: in BlockMask::counts
  Tile tile;
  bool keeps_everything; // there is nothing to choose
  uint64_t* bits;
};

// Key blocks [begin, end) of a KV head.
struct BlockRun {
  Sequence s;
  int kv_head;
  int64_t begin, end;
};

class SelectFrame;

// A run of a sequence's list of rows. They are of one KV head.
struct Item {
  const SelectFrame& frame;
  const Sequence s;
  const int kv_head;
  const std::span<const MaskRow> rows;
};

class SelectFrame {
 public:
  // Without a mask there is nothing to run: memory is only counted.
  SelectFrame(const SelectCall& call, const ItemShape& shape, BlockMask* mask, Workspace& memory);

  const SelectCall& call() const { return call_; }
  BlockMask& mask() const { return *mask_; }
  int threads() const { return threads_; }
  // Panels of the sequences that go through together, at most. 0: no sequence is selected for.
  int64_t capacity() const { return capacity_; }
  // Memory of each thread: so many bytes for the method, besides the frame's own.
  void TakeScratch(Workspace& memory, size_t bytes);

  // Goes on to the next wave. False: there is none.
  bool NextWave();
  // The wave's memory holds n parts for each sequence, of KV heads for instance: the first panel of part i of s.
  int64_t Panel(const Sequence& s, int64_t i, int64_t n) const {
    return ranges_[s.index].panel * n + i * call_.Panels(s);
  }

  // work(sequence, unit, scratch) for all units of the sequences of a wave that are selected for: `count(sequence)` of
  // each.
  template <typename Count, typename Work>
  void ForUnits(const Count& count, const Work& work) const {
    ForWave([&](const Sequence& s) { return IsSelected(s) ? count(s) : 0; }, work);
  }

  // work(run, scratch) for runs of key blocks of single KV heads.
  template <typename Work>
  void ForRuns(const Work& work) const {
    const auto runs_of = [&](const Sequence& s) { return DivUp(call_.g.Blocks(s), kRunBlocks); };
    ForUnits(
        [&](const Sequence& s) { return runs_of(s) * call_.p.kv_heads; },
        [&](const Sequence& s, int64_t unit, Workspace scratch) {
          const int64_t head = unit / runs_of(s), begin = unit % runs_of(s) * kRunBlocks;
          work(BlockRun{s, static_cast<int>(head), begin, std::min(begin + kRunBlocks, call_.g.Blocks(s))}, scratch);
        });
  }

  // work(item, scratch) for all items of a wave, and finishes their rows. Where all of an item's rows are kept whole
  // there is no call of `work`.
  template <typename Work>
  void ForItems(const Work& work) const {
    ForWave([&](const Sequence& s) { return Items(s); },
            [&](const Sequence& s, int64_t i, Workspace scratch) {
              const Item item = ItemAt(s, i, scratch.Take<MaskRow>(max_rows_));
              if (ClearRows(item)) work(item, scratch);
              FinishRows(item);
            });
  }

 private:
  // Where a sequence's part of the wave begins, in its list of units and in its panels.
  struct WorkRange {
    int64_t unit, panel;
    int32_t fallback;
  };

  bool IsSelected(const Sequence& s) const { return ranges_[s.index].fallback == FP_SELECTED; }
  int64_t Run(const Sequence& s) const { return shape_.one_tile ? shape_.heads : call_.g.Tiles(s) * shape_.heads; }
  int64_t Items(const Sequence& s) const;
  Item ItemAt(const Sequence& s, int64_t i, MaskRow* rows) const;
  MaskRow RowAt(const Sequence& s, int64_t i) const;
  void EmptyLists(const BlockMask& mask) const;
  bool ClearRows(const Item& item) const; // whether some row is to be chosen for
  void FinishRows(const Item& item) const;
  int SequenceOfWork(int64_t unit) const;

  template <typename Count, typename Work>
  void ForWave(const Count& count, const Work& work) const {
    int64_t units = 0;
    for (int b = wave_begin_; b < wave_end_; ++b) {
      ranges_[b].unit = units;
      units += count(SequenceOf(call_.p, b));
    }
    ForAll(threads_, units, [&](int64_t i, int thread) {
      const int b = SequenceOfWork(i);
      work(SequenceOf(call_.p, b), i - ranges_[b].unit, Workspace(scratch_ + scratch_bytes_ * thread));
    });
  }

  const SelectCall& call_;
  const ItemShape shape_;
  BlockMask* const mask_;
  int threads_ = 1;
  int64_t capacity_ = 0;
  int64_t max_rows_ = 0; // of an item
  WorkRange* ranges_;    // [batch]
  std::byte* scratch_ = nullptr;
  size_t scratch_bytes_ = 0; // of one thread
  int wave_begin_ = 0, wave_end_ = 0;
};

// Sets the bits of forced blocks.
void KeepForced(const Policy& policy, const Tile& tile, uint64_t* row);

// Selects, or without a mask counts the bytes of workspace. Returns those.
template <typename Method>
size_t RunSelect(const Problem& p, const Policy& policy, const Exec& exec, BlockMask* mask, void* workspace) {
  const SelectCall call{p, policy, exec, Geometry::Of(p, policy)};
  Method method(call);
  Workspace memory(workspace), counted(nullptr);
  SelectFrame frame(call, method.Shape(), mask, memory);
  if (frame.capacity() > 0) {
    method.Take(memory, frame.capacity());
    method.TakeScratch(counted);
  }
  frame.TakeScratch(memory, counted.used());
  while (mask && frame.NextWave()) {
    if (frame.capacity() > 0) method.Describe(frame);
    frame.ForItems([&](const Item& item, Workspace scratch) { method.Choose(item, method.TakeScratch(scratch)); });
  }
  return memory.used();
}

template <typename Method>
constexpr Selector SelectorBy() {
  return {[](const Problem& p, const Policy& policy, const Exec& exec) {
            return RunSelect<Method>(p, policy, exec, nullptr, nullptr);
          },
          [](const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace) {
            RunSelect<Method>(p, policy, exec, &mask, workspace);
          }};
}

// A method that keeps its forced blocks and looks at no key: Dense and Streaming.
class ForcedBlocks {
 public:
  struct Scratch {};
  explicit ForcedBlocks(const SelectCall& call) : heads_(call.g.group / call.g.heads_per_tile) {}
  ItemShape Shape() const { return {.heads = heads_}; }
  void Take(Workspace&, int64_t) {}
  Scratch TakeScratch(Workspace&) const { return {}; }
  void Describe(const SelectFrame&) const {}
  void Choose(const Item&, const Scratch&) const {}

 private:
  const int heads_; // mask heads of a KV head
};

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_FRAME_H_
