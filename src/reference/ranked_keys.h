// What the references of Gather and S2O share: a tile keeps the blocks of its segment and of the window before it, and
// the keys before those are ranked by their energies. The energy of key j is the root mean square over the query heads
// of the list of
//
//     exp(s q̄.k_j) / sum of exp(s q̄.k_t) over the keys t that the segment's last row sees,
//
// with the mean query q̄ of the segment rounded once to q's dtype. Products that are not finite count for nothing. Keys
// are in the order of their energies, equal ones by index.
#ifndef FLASHPREFILL_REFERENCE_RANKED_KEYS_H_
#define FLASHPREFILL_REFERENCE_RANKED_KEYS_H_

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "core/segment.h"
#include "reference/selector.h"

namespace flashprefill::reference {

class RankedKeys : public HeadSelector {
 public:
  RankedKeys(const HeadView& head, int64_t segment_tokens)
      : head_(head), tiles_(SegmentTiles(segment_tokens, head.geometry)) {}

  // Blocks are the segment's own and its window's.
  TileChoice Choose(const Tile& tile) const override {
    const Segment segment = SegmentAt(tile.begin / head_.geometry.tile_tokens / tiles_);
    TileChoice choice;
    choice.energy.resize(static_cast<size_t>(tile.visible));
    choice.scored.resize(static_cast<size_t>(tile.visible));
    choice.kept.resize(static_cast<size_t>(tile.visible));
    choice.near_tie.resize(static_cast<size_t>(tile.visible));
    std::fill(choice.kept.begin() + std::min(segment.window, tile.visible), choice.kept.end(), 1);
    return choice;
  }

  KeyChoice ChooseKeys(int64_t i) const override {
    const Segment segment = SegmentAt(i);
    KeyChoice choice;
    choice.energy = Energies(segment);
    choice.kept.resize(choice.energy.size());
    choice.near_tie.resize(choice.energy.size());
    std::vector<int64_t> order(static_cast<size_t>(segment.ranked()));
    std::iota(order.begin(), order.end(), segment.first_key);
    const std::vector<double>& energy = choice.energy;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return energy[a] > energy[b]; });
    Keep(segment, order, choice);
    return choice;
  }

 protected:
  // Sets what is kept of the ranked keys, which come in order.
  virtual void Keep(const Segment& segment, const std::vector<int64_t>& order, KeyChoice& choice) const = 0;

  // An energy's relative error: the tolerance is for sums over blocks.
  double Tolerance() const { return ScoreTolerance(head_.problem) / 4; }

  const HeadView head_;

 private:
  Segment SegmentAt(int64_t i) const {
    return Segment::Of(head_.problem, head_.geometry, head_.policy, head_.sequence, tiles_, i);
  }

  std::vector<double> Energies(const Segment& segment) const {
    const int64_t seen = head_.sequence.prefix + segment.end;
    std::vector<double> energy(static_cast<size_t>(segment.end_key)), mean(static_cast<size_t>(head_.keys.columns));
    std::vector<double> z(static_cast<size_t>(seen));
    for (const Matrix& queries : head_.queries) {
      MeanOfRows(queries, segment.begin, segment.end, head_.problem.q.dtype, mean.data());
      double largest = -std::numeric_limits<double>::infinity(), sum = 0;
      for (int64_t t = 0; t < seen; ++t) {
        z[t] = head_.problem.softmax_scale * Dot(mean.data(), head_.keys[t], head_.keys.columns);
        if (std::isfinite(z[t])) largest = std::max(largest, z[t]);
      }
      for (double& x : z) x = std::isfinite(x) ? std::exp(x - largest) : 0;
      for (const double x : z) sum += x;
      for (int64_t t = segment.first_key; t < segment.end_key && sum > 0; ++t) {
        energy[t] += z[t] / sum * (z[t] / sum) / static_cast<double>(head_.queries.size());
      }
    }
    for (double& e : energy) e = std::sqrt(e);
    return energy;
  }

  const int64_t tiles_; // of a segment
};

} // namespace flashprefill::reference

#endif // FLASHPREFILL_REFERENCE_RANKED_KEYS_H_
