// Select by the mean query of a tile against mean keys of blocks, which lie in the panels of plan.h. A method says what
// it needs to know about keys beforehand, and what it keeps.
#ifndef FLASHPREFILL_CPU_ENERGIES_POOLED_H_
#define FLASHPREFILL_CPU_ENERGIES_POOLED_H_

#include "cpu/energies/panels.h"

namespace flashprefill::cpu {

class PooledSelection {
 public:
  struct Scratch {
    float* describe;
    float* means;    // [group][head_dim]: mean queries times exponent_scale
    float* row;      // [head_dim]
    float* largest;  // [blocks]
    float* energies; // [blocks]
    uint64_t* keys;  // [blocks]
  };

  explicit PooledSelection(const SelectCall& call) : call_(call), panels_(call, {.query_pool = kTileRows}) {}

  ItemShape Shape() const { return {.heads = call_.g.group, .one_tile = true, .units = call_.MaxRuns()}; }
  void Take(Workspace& memory, int64_t panels) { panels_.Take(memory, panels); }
  Scratch TakeScratch(Workspace& memory) const {
    const int64_t blocks = call_.MaxBlocks(), d = call_.p.head_dim;
    return {.describe = panels_.TakeScratch(memory),
            .means = memory.Take<float>(call_.g.group * d),
            .row = memory.Take<float>(d),
            .largest = memory.Take<float>(blocks),
            .energies = memory.Take<float>(blocks),
            .keys = memory.Take<uint64_t>(blocks)};
  }
  void Describe(const SelectFrame& frame) const { panels_.Describe(frame, nullptr); }

 protected:
  // work(row of the mask, mean query) for the mask rows of an item that are chosen for.
  template <typename Work>
  void ForRows(const Item& item, const Scratch& scratch, const Work& work) const {
    const Tile& tile = item.rows[0].tile;
    const int head = static_cast<int>(item.rows[0].head);
    panels_.kernels.load_rows(call_.p, panels_.plan, item.s, tile.begin, tile.end, head,
                              head + static_cast<int>(item.rows.size()), scratch.means);
    const float* mean = scratch.means;
    for (const MaskRow& row : item.rows) {
      work(row, mean);
      mean += call_.p.head_dim;
    }
  }

  // scratch.energies[block] = 2^(row . mean - the largest of them) for the visible blocks of a tile for which
  // counts(block); 0 for the others.
  template <typename Counts>
  void Score(const Item& item, const Tile& tile, const float* row, const Scratch& scratch, const Counts& counts) const {
    const float* panel = panels_.Of(item.frame, item.s, item.kv_head);
    for (int64_t block = 0; block < tile.visible; block += kPanelBlocks, panel += panels_.plan.panel_floats) {
      std::fill_n(scratch.largest + block, kPanelBlocks, kNothing);
      std::fill_n(scratch.energies + block, kPanelBlocks, 0.f);
      const int32_t seen = static_cast<int32_t>(std::min<int64_t>(tile.visible - block, kPanelBlocks));
      panels_.kernels.score(call_.p, panels_.plan, panel, row, 1, &seen, scratch.largest + block,
                            scratch.energies + block);
    }
    for (int64_t block = 0; block < tile.visible; ++block) {
      if (!counts(block)) scratch.largest[block] = kNothing, scratch.energies[block] = 0;
    }
    panels_.kernels.energies(tile.visible, scratch.largest, scratch.energies);
  }

  // Index of the first block of a KV head of a sequence in arrays with an entry for each block of the wave's panels.
  int64_t BlockBegin(const SelectFrame& frame, const Sequence& s, int kv_head) const {
    return frame.Panel(s, kv_head, call_.p.kv_heads) * kPanelBlocks;
  }

  const SelectCall& call_;
  KeyPanels panels_;
};

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_ENERGIES_POOLED_H_
