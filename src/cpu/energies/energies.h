// Select by energies: FlashPrefill and Sketch. *Describe* reads K once and keeps some floats per block, *Choose* reads
// Q once, a tile at a time, and ends with the tile's bits: no score outlives its tile. Both are memory-bound where
// queries are pooled, so every row is read once, in long runs. With a query metric one query row per tile is read
// before both.
#ifndef FLASHPREFILL_CPU_ENERGIES_ENERGIES_H_
#define FLASHPREFILL_CPU_ENERGIES_ENERGIES_H_

#include "cpu/energies/panels.h"
#include "cpu/top_p.h"

namespace flashprefill::cpu {

class EnergySelection {
 public:
  struct Scratch {
    float* describe;
    float* rows;       // [max_rows][depth]
    float* largest;    // [mask rows of an item][blocks, in whole panels]
    float* sums;       // the same
    uint64_t* keys;    // [blocks]
    int32_t* visible;  // [max_rows]: blocks that a row sees
    int32_t* in_panel; // [max_rows]: those of one panel
  };

  EnergySelection(const SelectCall& call, const EnergyTerms& terms, const KeepRule& rule, bool query_metric)
      : call_(call), panels_(call, terms), rule_(rule), query_metric_(query_metric) {}

  ItemShape Shape() const {
    return {.heads = MaskHeads(), .one_tile = true, .rows = RowsPerItem(), .units = call_.MaxRuns(), .wave_panels = 16};
  }
  void Take(Workspace& memory, int64_t panels);
  Scratch TakeScratch(Workspace& memory) const;
  void Describe(const SelectFrame& frame) const;
  void Choose(const Item& item, const Scratch& scratch) const;

 private:
  const EnergyPlan& plan() const { return panels_.plan; }
  int MaskHeads() const { return plan().shared ? 1 : plan().g.group; } // of a KV head
  int RowsPerItem() const { return plan().shared ? 1 : plan().heads_per_item; }
  void MetricOf(const Sequence& s, int kv_head, float* metric) const;
  int64_t Score(const Item& item, int64_t stride, const Scratch& scratch) const;

  const SelectCall& call_;
  KeyPanels panels_;
  const KeepRule rule_;
  const bool query_metric_;
  float* metric_ = nullptr; // with a variance: [batch][kv_heads][head_dim]
};

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_ENERGIES_ENERGIES_H_
