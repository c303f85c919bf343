// See strided.h.
#include "cpu/strided/strided.h"

#include <algorithm>
#include <numeric>

#include "cpu/energies/kernels.h"

namespace flashprefill::cpu {
namespace {

constexpr int kCellsAtOnce = 8; // that are brought to fp32 before they are scored

} // namespace

void StridedSelection::Take(Workspace& memory, int64_t panels) {
  const int64_t cells = panels * kPanelBlocks * cells_per_block_;
  if (method_.cell_means) means_ = memory.Take<float>(cells * call_.p.kv_heads * method_.depth);
}

StridedSelection::Scratch StridedSelection::TakeScratch(Workspace& memory) const {
  const int64_t blocks = DivUp<int64_t>(call_.p.max_seqlen_k, call_.g.block_size);
  return {.panel = memory.Take<float>(method_.depth * kStridedLanes),
          .row = memory.Take<float>(call_.p.head_dim),
          .cells = memory.Take<float>(method_.cell_means ? 0 : kCellsAtOnce * Pitch()),
          .largest = memory.Take<float>(blocks * kStridedLanes),
          .sums = memory.Take<float>(blocks * kStridedLanes),
          .mass = memory.Take<float>(blocks),
          .visible = memory.Take<float>(kStridedLanes),
          .keys = memory.Take<uint64_t>(blocks)};
}

float* StridedSelection::MeansOf(const SelectFrame& frame, const Sequence& s, int kv_head) const {
  return means_ + frame.Panel(s, kv_head, call_.p.kv_heads) * kPanelBlocks * cells_per_block_ * method_.depth;
}

void StridedSelection::Describe(const SelectFrame& frame) const {
  if (!method_.cell_means) return;
  frame.ForRuns([&](const BlockRun& run, Workspace) {
    const int64_t begin = run.begin * cells_per_block_;
    const int64_t end = std::min(run.end * cells_per_block_, DivUp<int64_t>(run.s.k_len, method_.stride));
    kernels_.mean_keys(call_.p, run.s, run.kv_head, method_.stride, begin * method_.stride, end - begin,
                       MeansOf(frame, run.s, run.kv_head) + begin * method_.depth);
  });
}

void StridedSelection::Choose(const Item& item, const Scratch& scratch) const {
  const int64_t cells = FillLanes(item, scratch), blocks = DivUp(cells, int64_t{cells_per_block_});
  for (int64_t block = 0; block < blocks; ++block) ScoreBlock(item, block, cells, scratch);
  kernels_.normalise(blocks, scratch.largest, scratch.sums);
  for (size_t i = 0; i < item.rows.size(); ++i) {
    const MaskRow& row = item.rows[i];
    if (row.keeps_everything) continue;
    const float* lanes = scratch.sums + static_cast<int64_t>(i) * cells_per_tile_;
    for (int64_t block = 0; block < row.tile.visible; ++block, lanes += kStridedLanes) {
      scratch.mass[block] = block < blocks ? std::accumulate(lanes, lanes + cells_per_tile_, 0.f) : 0.f;
    }
    method_.keep(call_.policy, row.tile, static_cast<int>(row.head), scratch.mass, scratch.keys, row.bits);
  }
}

// Fills the panel with the rows of an item. Returns how many cells any lane sees.
int64_t StridedSelection::FillLanes(const Item& item, const Scratch& scratch) const {
  std::fill_n(scratch.panel, method_.depth * kStridedLanes, 0.f);
  std::fill_n(scratch.visible, kStridedLanes, 0.f);
  int64_t most = 0;
  for (size_t i = 0; i < item.rows.size(); ++i) {
    const MaskRow& row = item.rows[i];
    int64_t lane = static_cast<int64_t>(i) * cells_per_tile_;
    for (int64_t q = row.tile.begin; !row.keeps_everything && q < row.tile.end; q += method_.stride, ++lane) {
      const int64_t seen = method_.fill_lane(call_.p, call_.policy, kernels_, item.s, row.tile, q,
                                             static_cast<int>(row.head), scratch.row, scratch.panel + lane);
      scratch.visible[lane] = static_cast<float>(seen);
      most = std::max(most, seen);
    }
  }
  return most;
}

// Leaves the largest score and the sum of powers of a block in each lane, of its cells among the first `cells`.
void StridedSelection::ScoreBlock(const Item& item, int64_t block, int64_t cells, const Scratch& scratch) const {
  float* largest = scratch.largest + block * kStridedLanes;
  float* sums = scratch.sums + block * kStridedLanes;
  std::fill_n(largest, kStridedLanes, kNothing);
  std::fill_n(sums, kStridedLanes, 0.f);
  const int64_t first = block * cells_per_block_, last = std::min(first + cells_per_block_, cells);
  if (method_.cell_means) {
    const float* means = MeansOf(item.frame, item.s, item.kv_head) + first * method_.depth;
    kernels_.score(scratch.panel, means, method_.depth, method_.depth, first, static_cast<int>(last - first),
                   scratch.visible, largest, sums);
    return;
  }
  for (int64_t cell = first; cell < last; cell += kCellsAtOnce) {
    const int n = static_cast<int>(std::min<int64_t>(kCellsAtOnce, last - cell));
    for (int c = 0; c < n; ++c) {
      float* into = scratch.cells + c * Pitch();
      const int64_t key = (cell + c) * method_.stride;
      const int64_t keys = std::min<int64_t>(method_.stride, item.s.k_len - key);
      kernels_.load_keys(call_.p, item.s, item.kv_head, key, key + keys, into);
      std::fill(into + keys * call_.p.head_dim, into + method_.depth, 0.f); // past the end
    }
    kernels_.score(scratch.panel, scratch.cells, Pitch(), method_.depth, cell, n, scratch.visible, largest, sums);
  }
}

} // namespace flashprefill::cpu
