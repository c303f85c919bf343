// Gather: for each segment of query tokens, the keys before its window by the softmax of the segment's mean query. The
// energy of key j is the root mean square over the query heads of the list of
//
//     exp(s q̄.k_j) / sum of exp(s q̄.k_t) over the keys t that the segment's last row sees,
//
// with the mean query q̄ rounded once to q's dtype. Products that are not finite count for nothing. Keys are kept in the
// order of their energies, equal ones by index: by gain, while 128 energy sqrt(rest) is at least `gain`, with `rest`
// the sum of the energies of the ranked keys from this one on; by budget, the first so many. Of more than max_keys the
// first max_keys are kept.
#include <algorithm>
#include <numeric>

#include "methods/gather/segment.h"
#include "reference/selector.h"

namespace flashprefill::methods::gather {
namespace {

using namespace reference;

class Gather : public HeadSelector {
 public:
  explicit Gather(const HeadView& head) : head_(head), policy_(reinterpret_cast<const fp_gather&>(head.policy)) {}

  // Blocks are the segment's own and its window's.
  TileChoice Choose(const Tile& tile) const override {
    const Segment segment = SegmentAt(tile.begin / head_.geometry.tile_tokens / SegmentTiles(policy_, head_.geometry));
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
    Keep(segment, choice);
    return choice;
  }

 private:
  Segment SegmentAt(int64_t i) const {
    return Segment::Of(head_.problem, head_.geometry, head_.policy, head_.sequence, i);
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

  // Whether the gain of a key with this energy reaches the policy's.
  bool Worth(double energy, double rest, double gain) const {
    return kGainKeys * energy * std::sqrt(std::max(0.0, rest)) >= gain;
  }

  void Keep(const Segment& segment, KeyChoice& choice) const {
    const std::vector<double>& energy = choice.energy;
    const double tolerance = ScoreTolerance(head_.problem) / 4; // which is for sums over blocks
    std::vector<int64_t> order(static_cast<size_t>(segment.ranked()));
    std::iota(order.begin(), order.end(), segment.first_key);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return energy[a] > energy[b]; });
    std::vector<double> rest(order.size() + 1); // of the keys from each rank on
    for (size_t r = order.size(); r-- > 0;) rest[r] = rest[r + 1] + energy[order[r]];

    const bool by_gain = !std::isnan(policy_.gain);
    const auto worth = [&](size_t rank) { return Worth(energy[order[rank]], rest[rank], policy_.gain); };
    size_t wanted = by_gain ? 0 : static_cast<size_t>(BudgetKeys(policy_, segment.ranked()));
    while (by_gain && wanted < order.size() && worth(wanted)) ++wanted;
    choice.wanted = static_cast<int64_t>(wanted);
    const size_t room = static_cast<size_t>(policy_.max_keys), most = by_gain ? room : std::min(room, wanted);
    for (size_t rank = 0; rank < std::min(wanted, room); ++rank) choice.kept[order[rank]] = 1;

    // Within the tolerance, a key may rank before or after all those whose energies are near its own, and where squares
    // are below 1e-36 fp32 ends. In descending order both bounds only grow.
    size_t before = 0, perhaps = 0;
    for (const int64_t key : order) {
      const double e = energy[key];
      while (before < order.size() && energy[order[before]] > e + e * tolerance + 1e-18) ++before;
      while (perhaps < order.size() && energy[order[perhaps]] >= e - e * tolerance - 1e-18) ++perhaps; // itself too
      bool in = perhaps <= most, out = before >= most;
      if (by_gain) {
        in &= Worth(e, rest[perhaps] + e, policy_.gain * (1 + 3 * tolerance));
        out |= !Worth(e, rest[before], policy_.gain * (1 - 3 * tolerance));
      }
      choice.near_tie[key] = !in && !out;
    }
  }

  HeadView head_;
  const fp_gather& policy_;
};

} // namespace

extern const reference::Selector kReference = {Make<Gather>};

} // namespace flashprefill::methods::gather
