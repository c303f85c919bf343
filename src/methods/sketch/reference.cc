// Sketch: a key block is described by the few keys farthest from its mean, and by the mean and diagonal variance of the
// other keys. The second-order term of the variance is what a Gaussian of that spread adds to the mean of exp(s q.k).
#include <algorithm>
#include <cmath>

#include "reference/energies.h"
#include "reference/selector.h"

namespace flashprefill::methods::sketch {
namespace {

using namespace reference;

// The weight of each dimension in a distance: 1, or with query_metric the sum of squares of the last row of each tile
// over all query heads of the KV head. Non-finite values are left out.
std::vector<double> Metric(const HeadView& head) {
  const Problem& p = head.problem;
  std::vector<double> weight(static_cast<size_t>(p.head_dim), 1);
  if (!reinterpret_cast<const fp_sketch&>(head.policy).query_metric) return weight;
  std::fill(weight.begin(), weight.end(), 0);
  const int64_t first = head.first_head / head.geometry.group * head.geometry.group;
  for (int64_t h = first; h < first + head.geometry.group; ++h) {
    const Matrix queries = LoadQueries(p, head.sequence, h);
    for (int64_t m = 0; m < head.geometry.Tiles(head.sequence); ++m) {
      const double* row = queries[head.geometry.TileOf(p, head.sequence, m).end - 1];
      for (int64_t d = 0; d < p.head_dim; ++d) weight[d] += std::isfinite(row[d]) ? row[d] * row[d] : 0;
    }
  }
  return weight;
}

// Keys [begin, end) in order of distance from their own mean (not rounded), farthest first, equal ones by index. A
// distance that is not a number counts as the nearest.
std::vector<int64_t> FarthestFirst(const Matrix& keys, int64_t begin, int64_t end, const std::vector<double>& weight) {
  const double n = static_cast<double>(end - begin);
  std::vector<double> mean(static_cast<size_t>(keys.columns)), distance;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t d = 0; d < keys.columns; ++d) mean[d] += keys[t][d] / n;
  }
  std::vector<int64_t> order;
  for (int64_t t = begin; t < end; ++t) {
    double sum = 0;
    for (int64_t d = 0; d < keys.columns; ++d) sum += weight[d] * (keys[t][d] - mean[d]) * (keys[t][d] - mean[d]);
    distance.push_back(std::isnan(sum) ? -1 : sum);
    order.push_back(t);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return distance[a - begin] > distance[b - begin]; });
  return order;
}

// Mean and population variance of some keys, both rounded, and the weight of their number.
Point Spread(const Matrix& keys, const std::vector<int64_t>& some, int32_t dtype) {
  const double n = static_cast<double>(some.size());
  Point point{n, {}, {}};
  for (int64_t d = 0; d < keys.columns; ++d) {
    double mean = 0, variance = 0;
    for (const int64_t t : some) mean += keys[t][d] / n;
    for (const int64_t t : some) variance += (keys[t][d] - mean) * (keys[t][d] - mean) / n;
    point.center.push_back(Rounded(dtype, mean));
    point.variance.push_back(Rounded(dtype, variance));
  }
  return point;
}

std::unique_ptr<HeadSelector> MakeSelector(const HeadView& head) {
  const auto& policy = reinterpret_cast<const fp_sketch&>(head.policy);
  const Geometry& g = head.geometry;
  const std::vector<double> weight = Metric(head);
  std::vector<std::vector<Point>> blocks(static_cast<size_t>(g.Blocks(head.sequence)));
  for (size_t b = 0; b < blocks.size(); ++b) {
    const int64_t begin = static_cast<int64_t>(b) * g.block_size;
    std::vector<int64_t> order = FarthestFirst(head.keys, begin, begin + g.BlockKeys(head.sequence, b), weight);
    const size_t outliers = std::min(static_cast<size_t>(policy.outliers), order.size());
    for (size_t i = 0; i < outliers; ++i) {
      const double* key = head.keys[order[i]];
      blocks[b].push_back({1, std::vector<double>(key, key + head.keys.columns), {}});
    }
    order.erase(order.begin(), order.begin() + static_cast<int64_t>(outliers));
    std::sort(order.begin(), order.end());
    if (!order.empty()) blocks[b].push_back(Spread(head.keys, order, head.problem.k.dtype));
  }
  KeepRule rule;
  rule.alpha = policy.alpha;
  rule.mass = policy.mass;
  rule.gain = policy.gain;
  rule.min_blocks = policy.min_blocks;
  return std::make_unique<EnergySelector>(head, std::move(blocks), policy.query_pool, rule);
}

} // namespace

extern const reference::Selector kReference = {MakeSelector};

} // namespace flashprefill::methods::sketch
