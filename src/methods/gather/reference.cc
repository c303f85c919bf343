// Gather: for each segment of query tokens, the keys before its window by the softmax of the segment's mean query
// (reference/ranked_keys.h). Keys are kept in the order of their energies: by gain, while 128 energy sqrt(rest) is at
// least `gain`, with `rest` the sum of the energies of the ranked keys from this one on; by budget, the first so many.
// Of more than max_keys the first max_keys are kept.
#include "methods/gather/segment.h"
#include "reference/ranked_keys.h"

namespace flashprefill::methods::gather {
namespace {

class Gather : public reference::RankedKeys {
 public:
  explicit Gather(const reference::HeadView& head)
      : RankedKeys(head, reinterpret_cast<const fp_gather&>(head.policy).segment),
        policy_(reinterpret_cast<const fp_gather&>(head.policy)) {}

 private:
  // Whether the gain of a key with this energy reaches the policy's.
  bool Worth(double energy, double rest, double gain) const {
    return kGainKeys * energy * std::sqrt(std::max(0.0, rest)) >= gain;
  }

  void Keep(const Segment& segment, const std::vector<int64_t>& order, reference::KeyChoice& choice) const override {
    const std::vector<double>& energy = choice.energy;
    const double tolerance = Tolerance();
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

  const fp_gather& policy_;
};

} // namespace

extern const reference::Selector kReference = {reference::Make<Gather>};

} // namespace flashprefill::methods::gather
