// See frame.h.
#include "cpu/frame.h"

#include "core/key_list.h"
#include "core/method.h"
#include "core/threads.h"
#include "core/vertical_slash.h"

namespace flashprefill::cpu {

SelectFrame::SelectFrame(const SelectCall& call, const ItemShape& shape, BlockMask* mask, Workspace& memory)
    : call_(call), shape_(shape), mask_(mask), ranges_(memory.Take<WorkRange>(call.p.batch)) {
  int64_t longest = 0, all = 0, items = 0;
  for (int b = 0; b < call.p.batch; ++b) {
    const Sequence s = SequenceOf(call.p, b);
    const int32_t fallback = FallbackOf(call.p, call.g, call.policy, s);
    if (mask) ranges_[b].fallback = fallback;
    if (mask && mask->fallback) mask->fallback[b] = fallback;
    items += Items(s);
    max_rows_ = std::max(max_rows_, std::min(shape.rows, Run(s)));
    if (fallback != FP_SELECTED) continue;
    longest = std::max(longest, call.Panels(s));
    all += call.Panels(s);
  }
  capacity_ = std::max(longest, std::min(all, shape.wave_panels));
  threads_ = static_cast<int>(std::clamp<int64_t>(std::max(items, shape.units), 1, ThreadCount(call.exec.threads)));
  if (mask) EmptyLists(*mask);
}

// Of the sequences that nothing is chosen for, too.
void SelectFrame::EmptyLists(const BlockMask& mask) const {
  for (int b = 0; b < call_.p.batch; ++b) {
    const Sequence s = SequenceOf(call_.p, b);
    for (int h = 0; h < call_.g.mask_heads; ++h) {
      if (HasVerticalSlash(mask)) std::fill_n(VerticalSlashAt(mask, b, h), 2, 0);
      for (int64_t i = 0; i < Segments(mask, s); ++i) std::fill_n(KeyListAt(mask, s, h, i), 2, 0);
    }
  }
}

void SelectFrame::TakeScratch(Workspace& memory, size_t bytes) {
  Workspace one(nullptr);
  one.Take<MaskRow>(max_rows_);
  scratch_bytes_ = one.used() + bytes;
  scratch_ = memory.Take<std::byte>(static_cast<int64_t>(scratch_bytes_) * threads_);
}

bool SelectFrame::NextWave() {
  wave_begin_ = wave_end_;
  for (int64_t panels = 0; wave_end_ < call_.p.batch; ++wave_end_) {
    const Sequence s = SequenceOf(call_.p, wave_end_);
    const int64_t own = IsSelected(s) ? call_.Panels(s) : 0;
    if (panels + own > capacity_) break;
    ranges_[wave_end_].panel = panels;
    panels += own;
  }
  return wave_begin_ < wave_end_;
}

int SelectFrame::SequenceOfWork(int64_t unit) const {
  const WorkRange* after = std::upper_bound(ranges_ + wave_begin_, ranges_ + wave_end_, unit,
                                            [](int64_t i, const WorkRange& range) { return i < range.unit; });
  return static_cast<int>(after - ranges_) - 1;
}

int64_t SelectFrame::Items(const Sequence& s) const {
  const int64_t run = Run(s), rows = call_.g.Tiles(s) * call_.g.mask_heads;
  return rows == 0 ? 0 : rows / run * DivUp(run, std::min(shape_.rows, run));
}

Item SelectFrame::ItemAt(const Sequence& s, int64_t i, MaskRow* rows) const {
  const Geometry& g = call_.g;
  const int64_t run = Run(s), most = std::min(shape_.rows, run), items = DivUp(run, most);
  // The rest comes first: items of several tiles hold whole multiples of `most` from the first tile on.
  const int64_t rest = run - (items - 1) * most, of_run = i % items;
  const int64_t begin = i / items * run + (of_run == 0 ? 0 : rest + (of_run - 1) * most);
  const int64_t count = of_run == 0 ? rest : most;
  for (int64_t r = 0; r < count; ++r) {
    if (r == 0 || (begin + r) % shape_.heads == 0) {
      rows[r] = RowAt(s, begin + r);
      continue;
    }
    rows[r] = rows[r - 1]; // of the same tile
    rows[r].head += 1;
    rows[r].index += g.tile_rows;
    rows[r].bits += g.tile_rows * g.words;
  }
  const int kv_head = static_cast<int>(rows[0].head * g.heads_per_tile / g.group);
  return {*this, s, kv_head, {rows, static_cast<size_t>(count)}};
}

// Row i of a sequence's list.
MaskRow SelectFrame::RowAt(const Sequence& s, int64_t i) const {
  const Geometry& g = call_.g;
  const int64_t tiles = g.Tiles(s), tile = i / shape_.heads;
  MaskRow row{};
  row.head = tile / tiles * shape_.heads + i % shape_.heads;
  row.m = tiles - 1 - tile % tiles;
  row.tile = g.TileOf(call_.p, s, row.m);
  const int64_t window = row.tile.diagonal - std::max(0, call_.policy.window_blocks - 1);
  row.keeps_everything = !IsSelected(s) || call_.policy.sink_blocks >= window || InDenseTail(g, call_.policy, s, row.m);
  row.index = g.Row(s, row.head, row.m);
  row.bits = mask_->bits + row.index * g.words;
  return row;
}

bool SelectFrame::ClearRows(const Item& item) const {
  bool any = false;
  for (const MaskRow& row : item.rows) any |= !row.keeps_everything;
  for (const MaskRow& row : item.rows) {
    if (any) FillRow(row.bits, call_.g.words, 0);
  }
  return any;
}

void SelectFrame::FinishRows(const Item& item) const {
  const Geometry& g = call_.g;
  for (const MaskRow& row : item.rows) {
    if (row.keeps_everything) {
      FillRow(row.bits, g.words, row.tile.visible);
    } else {
      for (int64_t w = 0; w < g.words; ++w) row.bits[w] = VisibleWord(row.bits, w, row.tile.visible);
      KeepForced(call_.policy, row.tile, row.bits);
    }
    if (!mask_->counts) continue;
    int64_t count = 0;
    for (int64_t w = 0; w < g.words; ++w) count += std::popcount(row.bits[w]);
    if (HasVerticalSlash(*mask_)) {
      const VerticalSlash extra = VerticalSlash::Of(*mask_, item.s.index, row.head);
      count += DivUp<int64_t>(VerticalSlashKeys(g, item.s, row.tile, extra, row.bits), g.block_size);
    }
    count += ListedBlocks(g, item.s, row.tile, KeyList::OfTile(*mask_, item.s, row.head, row.m), row.bits);
    mask_->counts[row.index] = static_cast<int32_t>(count);
  }
}

void KeepForced(const Policy& policy, const Tile& tile, uint64_t* row) {
  const int64_t window = std::max<int64_t>(0, tile.diagonal - std::max(0, policy.window_blocks - 1));
  for (int64_t b = 0; b < std::min<int64_t>(policy.sink_blocks, tile.visible); ++b) SetBit(row, b);
  for (int64_t b = window; b < tile.visible; ++b) SetBit(row, b);
}

} // namespace flashprefill::cpu
