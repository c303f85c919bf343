// See energies.h.
#include "cpu/energies/energies.h"

#include <cmath>

#include "core/half.h"

namespace flashprefill::cpu {

void EnergySelection::Take(Workspace& memory, int64_t panels) {
  const Problem& p = call_.p;
  panels_.Take(memory, panels);
  if (plan().variance) metric_ = memory.Take<float>(int64_t{p.batch} * p.kv_heads * p.head_dim);
}

EnergySelection::Scratch EnergySelection::TakeScratch(Workspace& memory) const {
  const int64_t blocks = call_.MaxBlocks();
  return {.describe = panels_.TakeScratch(memory),
          .rows = memory.Take<float>(int64_t{plan().max_rows} * plan().depth),
          .largest = memory.Take<float>(RowsPerItem() * blocks),
          .sums = memory.Take<float>(RowsPerItem() * blocks),
          .keys = memory.Take<uint64_t>(blocks),
          .visible = memory.Take<int32_t>(plan().max_rows),
          .in_panel = memory.Take<int32_t>(plan().max_rows)};
}

void EnergySelection::Describe(const SelectFrame& frame) const {
  const Problem& p = call_.p;
  if (metric_) {
    frame.ForUnits([&](const Sequence&) { return int64_t{p.kv_heads}; },
                   [&](const Sequence& s, int64_t head, Workspace) {
                     MetricOf(s, static_cast<int>(head), metric_ + (s.index * p.kv_heads + head) * p.head_dim);
                   });
  }
  panels_.Describe(frame, metric_);
}

// The weight of a dimension in the distance of a key of this head from its block's mean: 1, or with query_metric the
// sum of squares of the last rows of all tiles of its query heads there. Values that are not finite are left out.
void EnergySelection::MetricOf(const Sequence& s, int kv_head, float* metric) const {
  const Problem& p = call_.p;
  std::fill_n(metric, p.head_dim, query_metric_ ? 0.f : 1.f);
  if (!query_metric_) return;
  for (int64_t m = 0; m < plan().g.Tiles(s); ++m) {
    const int64_t row = std::min<int64_t>((m + 1) * plan().g.tile_tokens, s.q_len) - 1;
    for (int h = kv_head * plan().g.group; h < (kv_head + 1) * plan().g.group; ++h) {
      const int64_t offset = RowOffset(p, p.q.stride, s, row, h);
      for (int64_t d = 0; d < p.head_dim; ++d) {
        const float x = LoadElement(p.q.data, p.q.dtype, offset + d * p.q.stride[3]);
        if (std::isfinite(x)) metric[d] += x * x;
      }
    }
  }
}

void EnergySelection::Choose(const Item& item, const Scratch& scratch) const {
  const int64_t stride = call_.Panels(item.s) * kPanelBlocks;
  const int64_t scored = Score(item, stride, scratch);
  if (scored == 0) return;
  int64_t at = 0;
  for (const MaskRow& row : item.rows) {
    const float largest = panels_.kernels.energies(scored, scratch.largest + at, scratch.sums + at);
    KeepByEnergy(rule_, scratch.sums + at, scored, largest, scratch.keys, row.bits);
    at += stride;
  }
}

// Sums up the energies of all mask rows of an item. Returns how many blocks any of its query rows sees.
int64_t EnergySelection::Score(const Item& item, int64_t stride, const Scratch& scratch) const {
  const Tile& tile = item.rows[0].tile;
  const int64_t tokens = tile.end - tile.begin;
  const int lists = static_cast<int>(item.rows.size());
  const int head_begin = static_cast<int>(item.rows[0].head) * plan().g.heads_per_tile;
  const int head_end = head_begin + lists * plan().g.heads_per_tile;
  const int rows_per_head = plan().RowsPerHead(tokens);
  const int rows = rows_per_head * (head_end - head_begin);
  const int rows_per_list = rows / lists;
  int64_t scored = 0;
  for (int r = 0; r < rows; ++r) {
    const int64_t last = std::min<int64_t>((r % rows_per_head + 1) * int64_t{plan().query_pool}, tokens) - 1;
    const int64_t visible = plan().Visible(item.s, tile, tile.begin + last);
    scratch.visible[r] = static_cast<int32_t>(visible);
    scored = std::max(scored, visible);
  }
  if (scored == 0) return 0;
  const EnergyKernels& kernels = panels_.kernels;
  kernels.load_rows(call_.p, plan(), item.s, tile.begin, tile.end, head_begin, head_end, scratch.rows);
  const float* panel = panels_.Of(item.frame, item.s, item.kv_head);
  for (int64_t block = 0; block < scored; block += kPanelBlocks, panel += plan().panel_floats) {
    for (int r = 0; r < rows; ++r) {
      scratch.in_panel[r] = static_cast<int32_t>(std::clamp<int64_t>(scratch.visible[r] - block, 0, kPanelBlocks));
    }
    for (int list = 0; list < lists; ++list) {
      float* largest = scratch.largest + list * stride + block;
      float* sums = scratch.sums + list * stride + block;
      std::fill_n(largest, kPanelBlocks, kNothing);
      std::fill_n(sums, kPanelBlocks, 0.f);
      const int first = list * rows_per_list;
      kernels.score(call_.p, plan(), panel, scratch.rows + int64_t{first} * plan().depth, rows_per_list,
                    scratch.in_panel + first, largest, sums);
    }
  }
  return scored;
}

} // namespace flashprefill::cpu
