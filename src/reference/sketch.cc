// Sketch: a key block is the few keys farthest from its mean, each for itself, and the mean and diagonal variance of
// the other keys. The second-order term of the variance is what a Gaussian of that spread would add to the mean of
// exp(s q.k).
#include <algorithm>
#include <cmath>

#include "reference/energies.h"

namespace flashprefill::reference {
namespace {

// Keys [begin, end) in order of distance from their own mean (not rounded), farthest first, equal ones by index. A
// distance that is not a number counts as the nearest.
std::vector<int64_t> FarthestFirst(const Matrix& keys, int64_t begin, int64_t end) {
  const double n = static_cast<double>(end - begin);
  std::vector<double> mean(static_cast<size_t>(keys.columns)), distance;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t d = 0; d < keys.columns; ++d) mean[d] += keys[t][d] / n;
  }
  std::vector<int64_t> order;
  for (int64_t t = begin; t < end; ++t) {
    double sum = 0;
    for (int64_t d = 0; d < keys.columns; ++d) sum += (keys[t][d] - mean[d]) * (keys[t][d] - mean[d]);
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

} // namespace

std::unique_ptr<HeadSelector> MakeSketch(const HeadView& head) {
  const auto& policy = reinterpret_cast<const fp_sketch&>(head.policy);
  const Geometry& g = head.geometry;
  std::vector<std::vector<Point>> blocks(static_cast<size_t>(g.Blocks(head.sequence)));
  for (size_t b = 0; b < blocks.size(); ++b) {
    const int64_t begin = static_cast<int64_t>(b) * g.block_size;
    std::vector<int64_t> order = FarthestFirst(head.keys, begin, begin + g.BlockKeys(head.sequence, b));
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
  rule.min_blocks = policy.min_blocks;
  return std::make_unique<EnergySelector>(head, std::move(blocks), policy.query_pool, rule);
}

} // namespace flashprefill::reference
