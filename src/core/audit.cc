// What a sample of rows says about a head: which rows are drawn, and the bounds that follow. See guard.h.
#include <algorithm>
#include <cmath>

#include "core/guard.h"

namespace flashprefill {
namespace {

bool LeavesOut(const Geometry& g, const BlockMask& mask, const Tile& tile, int64_t row) {
  int64_t kept = 0;
  for (int64_t w = 0; w < DivUp<int64_t>(tile.visible, 64); ++w) {
    kept += std::popcount(VisibleWord(mask.bits + row * g.words, w, tile.visible));
  }
  return kept < tile.visible;
}

// Calls body(tile) for the tiles of a mask head that leave something out.
template <typename Body>
void ForSparseTiles(const Problem& p, const Geometry& g, const BlockMask& mask, const Sequence& s, int64_t mask_head,
                    const Body& body) {
  for (int64_t m = 0; m < g.Tiles(s); ++m) {
    const Tile tile = g.TileOf(p, s, m);
    if (LeavesOut(g, mask, tile, g.Row(s, mask_head, m))) body(tile);
  }
}

double Percentile(float* values, int64_t count, double percentile) {
  std::sort(values, values + count);
  const PercentilePlace at = PercentilePlace::Of(percentile, count);
  return values[at.below] + at.share * (values[at.above(count)] - values[at.below]);
}

// Of the blocks that weigh most in some row, the one that weighs most over all of them; the lower index among equals.
int32_t HeaviestMissed(std::span<const AuditRow> rows) {
  int32_t heaviest = -1;
  double most = 0;
  for (const AuditRow& row : rows) {
    if (row.missed_block < 0) continue;
    double sum = 0;
    for (const AuditRow& other : rows) sum += other.missed_block == row.missed_block ? other.missed : 0;
    if (sum > most || (sum == most && row.missed_block < heaviest)) most = sum, heaviest = row.missed_block;
  }
  return heaviest;
}

double LowerBoundOf(std::span<const AuditRow> rows, double recall) {
  const double count = static_cast<double>(rows.size());
  double worst = 1, squares = 0;
  for (const AuditRow& row : rows) worst = std::min(worst, double{row.recall});
  const LowerBound bound = LowerBound::Of(count, recall, worst);
  for (const AuditRow& row : rows) squares += (row.recall - bound.mean) * (row.recall - bound.mean);
  return bound.From(count, squares);
}

} // namespace

int64_t GuardRows(const Problem& p, const fp_guard& guard, const Sequence& s) {
  return GuardRowsOf(guard.rows, p.causal, s.q_len, s.k_len);
}

int64_t SparseRows(const Problem& p, const BlockMask& mask, const Sequence& s, int64_t mask_head) {
  int64_t rows = 0;
  ForSparseTiles(p, Geometry::Of(p, mask), mask, s, mask_head,
                 [&](const Tile& tile) { rows += tile.end - tile.begin; });
  return rows;
}

int64_t DrawRows(const Problem& p, const BlockMask& mask, const fp_guard& guard, const Sequence& s, int32_t head,
                 int draw, AuditRow* rows, int64_t* sparse) {
  const Geometry g = Geometry::Of(p, mask);
  const int64_t mask_head = head / g.heads_per_tile;
  *sparse = SparseRows(p, mask, s, mask_head);
  const int64_t strata = std::min(GuardRows(p, guard, s), *sparse);
  const GuardSeed seed{guard.seed, guard.layer, draw};
  int64_t j = 0, before = 0; // rows of sparse tiles before this one
  const auto drawn = [&] { return DrawnRow(seed, s.index, s.prefix, head, j, *sparse, strata); };
  ForSparseTiles(p, g, mask, s, mask_head, [&](const Tile& tile) {
    for (int64_t row; j < strata && (row = drawn() - before) < tile.end - tile.begin; ++j) {
      rows[j] = {s.index, head, static_cast<int32_t>(tile.begin + row), -1, 0, 1};
    }
    before += tile.end - tile.begin;
  });
  return strata;
}

HeadAudit Summarise(std::span<const AuditRow> rows, int64_t sparse, double target, float* scratch) {
  HeadAudit head;
  const int64_t count = head.rows = static_cast<int64_t>(rows.size());
  head.sparse = sparse;
  if (count == 0) return head;
  double weighted = 0;
  int64_t bad = 0;
  for (int64_t j = 0; j < count; ++j) {
    const double recall = scratch[j] = rows[j].recall;
    weighted += recall * static_cast<double>(StratumRows(j, sparse, count));
    bad += recall < kBadRecall;
  }
  head.recall = weighted / static_cast<double>(sparse);
  head.low = count < sparse ? LowerBoundOf(rows, head.recall) : head.recall; // if all are audited, nothing is left out
  head.p05 = Percentile(scratch, count, 0.05);
  head.missed_block = HeaviestMissed(rows);
  head.is_low = KeepsTooLittle(head.low, target, bad, count);
  return head;
}

Moments MomentsOf(std::span<const AuditRow> rows) {
  Moments m;
  for (const AuditRow& row : rows) m.Add({1, row.recall, double{row.recall} * row.recall});
  return m;
}

} // namespace flashprefill
