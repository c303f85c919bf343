// Sums of a head's last rows by vertical and slash, pooled logits, and the largest of a list.
#include "reference/vertical_slash.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace flashprefill::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Whether a surely ranks before b, or may.
bool Before(double a, double b, double tolerance) { return a > b + std::abs(b) * tolerance + 1e-35; }
bool PerhapsBefore(double a, double b, double tolerance) { return a >= b - std::abs(b) * tolerance - 1e-35; }

} // namespace

VerticalSlashSums SumVerticalSlash(const HeadView& head, int64_t rows) {
  const Sequence& s = head.sequence;
  const Matrix& queries = head.queries.front();
  VerticalSlashSums sums{std::vector<double>(static_cast<size_t>(s.k_len)),
                         std::vector<double>(static_cast<size_t>(s.k_len))};
  rows = std::min(rows, s.q_len);
  std::vector<double> z(static_cast<size_t>(s.k_len));
  for (int64_t i = s.q_len - rows; i < s.q_len; ++i) {
    const int64_t position = s.prefix + i;
    double largest = -kInfinity, sum = 0;
    for (int64_t t = 0; t <= position; ++t) {
      z[t] = head.problem.softmax_scale * Dot(queries[i], head.keys[t], queries.columns);
      if (std::isfinite(z[t])) largest = std::max(largest, z[t]); // non-finite scores are ignored
    }
    for (int64_t t = 0; t <= position; ++t) z[t] = std::isfinite(z[t]) ? std::exp(z[t] - largest) : 0;
    for (int64_t t = 0; t <= position; ++t) sum += z[t];
    for (int64_t t = 0; t <= position && sum > 0; ++t) {
      const double share = z[t] / sum / static_cast<double>(rows);
      sums.column[t] += share;
      sums.diagonal[position - t] += share;
    }
  }
  return sums;
}

Matrix PooledLogits(const HeadView& head, const Matrix& key_means) {
  const Sequence& s = head.sequence;
  const int64_t size = head.geometry.block_size;
  const Matrix& queries = head.queries.front();
  Matrix logits(DivUp(s.q_len, size), key_means.rows);
  std::vector<double> mean(static_cast<size_t>(queries.columns));
  for (int64_t r = 0; r < logits.rows; ++r) {
    const int64_t end = std::min((r + 1) * size, s.q_len);
    MeanOfRows(queries, r * size, end, head.problem.q.dtype, mean.data());
    for (int64_t c = 0; c < logits.columns; ++c) {
      const double z = head.problem.softmax_scale * Dot(mean.data(), key_means[c], queries.columns);
      const bool seen = c <= (s.prefix + end - 1) / size;
      logits[r][c] = seen && std::isfinite(z) ? z : -kInfinity;
    }
  }
  return logits;
}

Chosen Largest(const std::vector<double>& values, const Count& count, double tolerance) {
  const size_t n = values.size();
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return values[a] > values[b]; });
  Chosen chosen(n);
  // In descending order both bounds only grow.
  size_t before = 0, perhaps = 0;
  for (size_t rank = 0; rank < n; ++rank) {
    const size_t i = order[rank];
    const double value = values[i];
    if (value == -kInfinity) break;
    if (value == kInfinity) { // forced: among each other they go by index, which no score can change
      chosen.kept[i] = chosen.least[i] = chosen.most[i] = static_cast<int64_t>(rank) < count.is;
      continue;
    }
    while (before < n && (values[order[before]] == kInfinity || Before(values[order[before]], value, tolerance)))
      ++before;
    while (perhaps < n && PerhapsBefore(values[order[perhaps]], value, tolerance)) ++perhaps; // includes itself
    chosen.kept[i] = static_cast<int64_t>(rank) < count.is;
    chosen.least[i] = static_cast<int64_t>(perhaps) <= count.least;
    chosen.most[i] = static_cast<int64_t>(before) < count.most;
  }
  return chosen;
}

TileChoice ChooseBlocks(const HeadView& head, const Tile& tile, int32_t rounding, const Chosen& verticals,
                        const Chosen& slashes) {
  // Whether a vertical lies in the block, or a slash crosses it inside the tile.
  const auto keeps = [&](std::vector<uint8_t> Chosen::*level, int64_t block) {
    const int64_t begin = block * head.geometry.block_size;
    const int64_t end = begin + head.geometry.BlockKeys(head.sequence, block);
    for (int64_t t = begin; t < end; ++t) {
      if ((verticals.*level)[t]) return true;
    }
    const int64_t first = head.sequence.prefix + tile.begin, last = head.sequence.prefix + tile.end - 1;
    for (int64_t d = std::max<int64_t>(0, first - (end - 1)); d <= last - begin; ++d) {
      if ((slashes.*level)[d]) return true;
    }
    return false;
  };
  TileChoice choice;
  choice.energy.resize(static_cast<size_t>(tile.visible));
  choice.scored.assign(choice.energy.size(), 1);
  choice.kept.resize(choice.energy.size());
  choice.near_tie.resize(choice.energy.size());
  for (int64_t b = 0; rounding == FP_ROUND_BLOCKS && b < tile.visible; ++b) {
    choice.kept[b] = keeps(&Chosen::kept, b);
    choice.near_tie[b] = keeps(&Chosen::most, b) && !keeps(&Chosen::least, b);
  }
  return choice;
}

void List(const Chosen& chosen, std::vector<int32_t>& numbers) {
  for (size_t t = 0; t < chosen.kept.size(); ++t) {
    if (chosen.kept[t]) numbers.push_back(static_cast<int32_t>(t));
  }
}

} // namespace flashprefill::reference
