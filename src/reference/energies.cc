// The energy of a key block for a tile of queries, and which blocks to keep by it: Rules 1, 2 and 5 of the design, one
// function each.
#include "reference/energies.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace flashprefill::reference {

EnergySelector::EnergySelector(const HeadView& head, std::vector<std::vector<Point>> blocks, int64_t query_pool,
                               KeepRule rule)
    : head_(head), blocks_(std::move(blocks)), query_pool_(query_pool), rule_(rule) {}

// The scored rows of a tile: means of query_pool tokens of one head, counted from the tile's first token. The last row
// of a head may be a mean of fewer. Heads are never pooled together.
std::vector<EnergySelector::Row> EnergySelector::RowsOf(const Tile& tile) const {
  std::vector<Row> rows;
  for (const Matrix& queries : head_.queries) {
    for (int64_t begin = tile.begin; begin < tile.end; begin += query_pool_) {
      const int64_t end = std::min(begin + query_pool_, tile.end);
      Row row{head_.sequence.prefix + end - 1, std::vector<double>(static_cast<size_t>(queries.columns))};
      MeanOfRows(queries, begin, end, head_.problem.q.dtype, row.q.data());
      rows.push_back(std::move(row));
    }
  }
  return rows;
}

// Rule 2. With a list per query head a row scores a block if it sees the block's last token. With shared heads it
// scores a block if it sees the first token and the block is complete at the tile's last token.
bool EnergySelector::Sees(const Tile& tile, int64_t position, int64_t block) const {
  const int64_t size = head_.geometry.block_size;
  if (!head_.policy.share_heads) return position >= block * size + size - 1;
  const int64_t complete = (head_.sequence.prefix + tile.end) / size;
  return position >= block * size && block < complete;
}

TileChoice EnergySelector::Choose(const Tile& tile) const {
  const double scale = head_.problem.softmax_scale;
  TileChoice choice;
  choice.energy.resize(tile.visible);
  choice.scored.resize(tile.visible);
  choice.kept.resize(tile.visible);
  choice.rule = rule_;

  struct Exponent {
    int64_t block;
    double weight, value;
  };
  std::vector<Exponent> exponents;
  for (const Row& row : RowsOf(tile)) {
    for (int64_t b = 0; b < tile.visible; ++b) {
      if (!Sees(tile, row.position, b)) continue;
      choice.scored[b] = 1;
      for (const Point& point : blocks_[b]) {
        double z = scale * Dot(row.q.data(), point.center.data(), head_.keys.columns);
        for (size_t d = 0; d < point.variance.size(); ++d) {
          z += 0.5 * scale * scale * row.q[d] * row.q[d] * point.variance[d];
        }
        if (std::isfinite(z)) exponents.push_back({b, point.weight, z}); // non-finite scores are ignored
      }
    }
  }

  double largest = -std::numeric_limits<double>::infinity();
  for (const Exponent& e : exponents) largest = std::max(largest, e.value);
  for (const Exponent& e : exponents) choice.energy[e.block] += e.weight * std::exp(e.value - largest);
  ApplyRule(choice);
  return choice;
}

std::vector<int64_t> Ranking(const TileChoice& choice) {
  std::vector<int64_t> order;
  for (size_t b = 0; b < choice.energy.size(); ++b) {
    if (choice.scored[b]) order.push_back(static_cast<int64_t>(b));
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return choice.energy[a] > choice.energy[b]; });
  return order;
}

void ApplyRule(TileChoice& choice) {
  const std::vector<int64_t> order = Ranking(choice);
  if (order.empty()) return;
  const KeepRule& rule = choice.rule;
  if (!std::isnan(rule.alpha)) {
    const double largest = choice.energy[order.front()];
    for (const int64_t b : order) choice.kept[b] = choice.energy[b] >= rule.alpha * largest;
  }
  if (!std::isnan(rule.mass)) {
    double total = 0, sum = 0;
    for (const int64_t b : order) total += choice.energy[b];
    for (const int64_t b : order) {
      choice.kept[b] = 1;
      sum += choice.energy[b];
      if (sum >= rule.mass * total) break; // this was the block that crosses p
    }
  }
  if (!std::isnan(rule.gain)) {
    double rest = 0; // energy of the blocks from here on
    for (const int64_t b : order) rest += choice.energy[b];
    const double total = rest;
    for (const int64_t b : order) {
      if (!(choice.energy[b] / total * std::sqrt(std::max(0.0, rest / total)) >= rule.gain)) break;
      choice.kept[b] = 1;
      rest -= choice.energy[b];
    }
  }
  const int64_t top = std::min(rule.min_blocks, static_cast<int64_t>(order.size()));
  for (int64_t i = 0; i < top; ++i) choice.kept[order[i]] = 1;
}

} // namespace flashprefill::reference
