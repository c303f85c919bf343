// What a sample of rows says about a head: which rows are drawn, and the bounds that follow. See guard.h.
#include <algorithm>
#include <cmath>

#include "core/guard.h"
#include "core/philox.h"

namespace flashprefill {
namespace {

constexpr int64_t kRowsPerAudit = 1024; // of a prompt
constexpr int64_t kLeastPerPrompt = 32, kLeastPerCall = 8;
constexpr double kBadRecall = 0.5, kBadShare = 0.05;

// Student's t at 95 %, one-sided, from the normal quantile (Abramowitz and Stegun 26.7.5): within 1 % from 3 on.
double TQuantile(double freedom) {
  constexpr double z = 1.6448536269514722, z3 = z * z * z, z5 = z3 * z * z;
  return z + (z3 + z) / (4 * freedom) + (5 * z5 + 16 * z3 + 3 * z) / (96 * freedom * freedom);
}

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

// The percentile as NumPy has it: between neighbours by the distance from them.
double Percentile(float* values, int64_t count, double share) {
  std::sort(values, values + count);
  const double at = share * static_cast<double>(count - 1);
  const int64_t below = static_cast<int64_t>(at), above = std::min(below + 1, count - 1);
  return values[below] + (at - static_cast<double>(below)) * (values[above] - values[below]);
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

// Student's t with one row more than was audited, which loses half as much again as the worst of them. Recalls are
// skewed: most rows lose little and a few lose much, and a plain t misses those that were not drawn. Over 22,680 audits
// of 32 rows of real heads (bench/lab/guard.py's) it was right in 88 %, and with that row in 97 %.
double LowerBound(std::span<const AuditRow> rows, double recall) {
  const double count = static_cast<double>(rows.size());
  if (count < 2) return 0;
  double worst = 1;
  for (const AuditRow& row : rows) worst = std::min(worst, double{row.recall});
  const double unseen = std::max(0.0, 1 - 1.5 * (1 - worst)), mean = (recall * count + unseen) / (count + 1);
  double squares = (unseen - mean) * (unseen - mean);
  for (const AuditRow& row : rows) squares += (row.recall - mean) * (row.recall - mean);
  return std::max(0.0, mean - TQuantile(count) * std::sqrt(squares / count / (count + 1)));
}

} // namespace

int64_t GuardRows(const Problem& p, const fp_guard& guard, const Sequence& s) {
  if (guard.rows > 0) return std::min<int64_t>(guard.rows, s.q_len);
  // A prompt's rows, shared out to its chunks.
  const int64_t prompt = std::max(kLeastPerPrompt, s.k_len / kRowsPerAudit);
  const int64_t share = p.causal && s.k_len > 0 ? DivUp(prompt * s.q_len, s.k_len) : prompt;
  return std::min(std::max(kLeastPerCall, share), s.q_len);
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
  const uint64_t key = guard.seed ^ static_cast<uint64_t>(s.prefix) << 32;
  int64_t j = 0, before = 0; // rows of sparse tiles before this one
  const auto drawn = [&] {   // the row of stratum j, counted over sparse tiles
    const int64_t begin = j * *sparse / strata, end = (j + 1) * *sparse / strata;
    const uint32_t words[] = {static_cast<uint32_t>(j), static_cast<uint32_t>(head), static_cast<uint32_t>(s.index),
                              static_cast<uint32_t>(guard.layer) * 2 + static_cast<uint32_t>(draw)};
    const uint32_t random = Philox({words[0], words[1], words[2], words[3]}, key)[0];
    return begin + static_cast<int64_t>(static_cast<uint64_t>(random) * static_cast<uint64_t>(end - begin) >> 32);
  };
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
    // Strata differ by a row at most; with their sizes as weights, all rows audited give the mean of all rows.
    const int64_t stratum = (j + 1) * sparse / count - j * sparse / count;
    weighted += recall * static_cast<double>(stratum);
    bad += recall < kBadRecall;
  }
  head.recall = weighted / static_cast<double>(sparse);
  head.low = count < sparse ? LowerBound(rows, head.recall) : head.recall; // if all are audited, nothing is left out
  head.p05 = Percentile(scratch, count, 0.05);
  head.missed_block = HeaviestMissed(rows);
  head.is_low = head.low < target || static_cast<double>(bad) > kBadShare * static_cast<double>(count);
  return head;
}

Moments Moments::Of(std::span<const AuditRow> rows) {
  Moments m;
  for (const AuditRow& row : rows) {
    ++m.count;
    m.sum += row.recall;
    m.squares += double{row.recall} * row.recall;
  }
  return m;
}

double Certificate(const Moments& m, double risk) {
  if (m.count == 0) return 1;
  if (m.count < 2) return 0;
  const double mean = m.sum / m.count;
  const double variance = std::max(0.0, m.squares - m.sum * mean) / (m.count - 1);
  const double log = std::log(2 / risk);
  return std::max(0.0, mean - std::sqrt(2 * variance * log / m.count) - 7 * log / (3 * (m.count - 1)));
}

} // namespace flashprefill
