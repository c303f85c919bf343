// Select by strided cells: XAttention and RRAttention. An item of work is as many rows of the mask of one KV head as
// fill the lanes of a panel: the heads of the group and then neighbouring tiles, which see nearly the same keys. All
// keys that any of them sees pass by once. What outlives a block of keys is a maximum and a sum per lane: blocks x 32 x
// 8 bytes per thread. A method says what its cells are, what a row is, and what is kept.
#ifndef FLASHPREFILL_CPU_STRIDED_STRIDED_H_
#define FLASHPREFILL_CPU_STRIDED_STRIDED_H_

#include "cpu/frame.h"
#include "cpu/strided/kernels.h"

namespace flashprefill::cpu {

struct StridedMethod {
  int stride;
  int64_t depth;   // floats per cell
  bool cell_means; // cells are means of keys, made once; else they are the keys themselves, read as they are needed
  // Fills column `lane` of a panel with the row of the tile's cell that begins at query `begin`, in exponents of two.
  // row: scratch memory of head_dim floats. Returns how many cells of keys it sees.
  int64_t (*fill_lane)(const Problem& p, const Policy& policy, const StridedKernels& kernels, const Sequence& s,
                       const Tile& tile, int64_t begin, int head, float* row, float* lane);
  // Sets the bits of what is kept by mass, forced blocks aside. keys: scratch memory, a word per block.
  void (*keep)(const Policy& policy, const Tile& tile, int head, const float* mass, uint64_t* keys, uint64_t* row);
};

class StridedSelection {
 public:
  struct Scratch {
    float *panel, *row, *cells, *largest, *sums, *mass, *visible;
    uint64_t* keys;
  };

  StridedSelection(const SelectCall& call, const StridedMethod& method)
      : call_(call),
        method_(method),
        kernels_(StridedKernelsFor(call.exec)),
        cells_per_tile_(kTileRows / method.stride),
        cells_per_block_(call.g.block_size / method.stride) {}

  ItemShape Shape() const {
    return {.heads = call_.g.group,
            .rows = kStridedLanes / cells_per_tile_,
            .units = method_.cell_means ? call_.MaxRuns() : 0};
  }
  void Take(Workspace& memory, int64_t panels);
  Scratch TakeScratch(Workspace& memory) const;
  void Describe(const SelectFrame& frame) const;
  void Choose(const Item& item, const Scratch& scratch) const;

 private:
  float* MeansOf(const SelectFrame& frame, const Sequence& s, int kv_head) const;
  int64_t FillLanes(const Item& item, const Scratch& scratch) const;
  void ScoreBlock(const Item& item, int64_t block, int64_t cells, const Scratch& scratch) const;
  // Floats from one cell of keys to the next. A cell is often 4 KiB, and eight of them side by side would all lie in
  // the same eight lines of L1.
  int64_t Pitch() const { return method_.depth + 16; }

  const SelectCall& call_;
  const StridedMethod method_;
  const StridedKernels& kernels_;
  const int cells_per_tile_, cells_per_block_;
  float* means_ = nullptr; // [panels][kv_heads][cells of a panel][depth]
};

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_STRIDED_STRIDED_H_
