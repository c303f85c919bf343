// See frame.h.
#include "cpu/frame.h"

#include "core/fallback.h"
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
    if (fallback != FP_SELECTED) continue;
    longest = std::max(longest, call.Panels(s));
    all += call.Panels(s);
  }
  capacity_ = std::max(longest, std::min(all, shape.wave_panels));
  threads_ = static_cast<int>(std::clamp<int64_t>(std::max(items, shape.units), 1, ThreadCount(call.exec.threads)));
  if (!mask || !HasVerticalSlash(*mask)) return;
  for (int b = 0; b < call.p.batch; ++b) {
    for (int h = 0; h < call.g.mask_heads; ++h) std::fill_n(VerticalSlashAt(*mask, b, h), 2, 0);
  }
}

void SelectFrame::TakeScratch(Workspace& memory, size_t bytes) {
  scratch_bytes_ = bytes;
  scratch_ = memory.Take<std::byte>(static_cast<int64_t>(bytes) * threads_);
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

Item SelectFrame::ItemAt(const Sequence& s, int64_t i) const {
  const int64_t run = Run(s), rows = std::min(shape_.rows, run), items = DivUp(run, rows);
  const int64_t first = i / items * run, begin = first + i % items * rows;
  const int64_t head = first / (call_.g.Tiles(s) * shape_.heads) * shape_.heads;
  return {*this, s, static_cast<int>(head * call_.g.heads_per_tile / call_.g.group), begin,
          std::min(begin + rows, first + run)};
}

MaskRow SelectFrame::RowAt(const Sequence& s, int64_t i) const {
  const Geometry& g = call_.g;
  const int64_t tiles = g.Tiles(s), heads = shape_.heads;
  MaskRow row{};
  row.head = i / (tiles * heads) * heads + i % heads;
  row.m = tiles - 1 - i / heads % tiles;
  row.tile = g.TileOf(call_.p, s, row.m);
  const int64_t window = row.tile.diagonal - std::max(0, call_.policy.window_blocks - 1);
  row.keeps_everything = !IsSelected(s) || InDenseTail(g, call_.policy, s, row.m) || call_.policy.sink_blocks >= window;
  row.index = g.Row(s, row.head, row.m);
  row.bits = mask_->bits + row.index * g.words;
  return row;
}

bool SelectFrame::ClearRows(const Item& item) const {
  bool any = false;
  for (int64_t i = item.begin; i < item.end; ++i) {
    const MaskRow row = item.Row(i);
    FillRow(row.bits, call_.g.words, 0);
    any |= !row.keeps_everything;
  }
  return any;
}

void SelectFrame::FinishRows(const Item& item) const {
  const Geometry& g = call_.g;
  for (int64_t i = item.begin; i < item.end; ++i) {
    const MaskRow row = item.Row(i);
    if (row.keeps_everything) {
      FillRow(row.bits, g.words, row.tile.visible);
    } else {
      for (int64_t w = 0; w < g.words; ++w) row.bits[w] = VisibleWord(row.bits, w, row.tile.visible);
      KeepForced(call_.policy, row.tile, row.bits);
    }
    if (!mask_->counts) continue;
    int64_t count = 0;
    for (int64_t w = 0; w < g.words; ++w) count += std::popcount(row.bits[w]);
    const VerticalSlash extra = VerticalSlash::Of(*mask_, item.s.index, row.head);
    count += DivUp<int64_t>(VerticalSlashKeys(g, item.s, row.tile, extra, row.bits), g.block_size);
    mask_->counts[row.index] = static_cast<int32_t>(count);
  }
}

void KeepForced(const Policy& policy, const Tile& tile, uint64_t* row) {
  const int64_t window = std::max<int64_t>(0, tile.diagonal - std::max(0, policy.window_blocks - 1));
  for (int64_t b = 0; b < std::min<int64_t>(policy.sink_blocks, tile.visible); ++b) SetBit(row, b);
  for (int64_t b = window; b < tile.visible; ++b) SetBit(row, b);
}

} // namespace flashprefill::cpu
