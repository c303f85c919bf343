// Prism (arXiv 2602.08426): the mean of a block averages out the dimensions that rotary embedding turns fast. So fast
// and slow dimensions are scored separately, each with a temperature that restores the energy lost.
#include <algorithm>
#include <cmath>

#include "methods/prism/rotary_bands.h"
#include "reference/selector.h"
#include "reference/top_p.h"

namespace flashprefill::methods::prism {
namespace {

using namespace reference;

class Prism : public HeadSelector {
 public:
  explicit Prism(const HeadView& head)
      : head_(head),
        policy_(reinterpret_cast<const fp_prism&>(head.policy)),
        bands_(RotaryBands::Of(policy_, head.problem.head_dim)),
        means_(BlockMeans(head.geometry, head.sequence, head.keys, head.problem.k.dtype)) {}

  TileChoice Choose(const Tile& tile) const override {
    std::vector<double> q(static_cast<size_t>(means_.columns));
    MeanOfRows(head_.queries.front(), tile.begin, tile.end, head_.problem.q.dtype, q.data());
    TileChoice choice;
    choice.energy.resize(static_cast<size_t>(tile.visible));
    choice.scored.assign(choice.energy.size(), 1);
    Verdict verdict{std::vector<uint8_t>(choice.energy.size()), std::vector<uint8_t>(choice.energy.size())};
    for (const bool high : {true, false}) {
      std::vector<uint8_t> in(q.size());
      for (int d = 0; d < head_.problem.head_dim; ++d) in[d] = high ? bands_.InHigh(d) : bands_.InLow(d);
      const std::vector<double> mass = BandMass(tile, q, in);
      if (mass.empty()) continue;
      verdict = Union(verdict, TopP(mass, policy_.mass, {}, ScoreTolerance(head_.problem)));
      for (size_t b = 0; b < mass.size(); ++b) choice.energy[b] += mass[b];
    }
    choice.kept = std::move(verdict.kept);
    choice.near_tie = std::move(verdict.near_tie);
    return choice;
  }

 private:
  // The softmax of one band over the visible blocks; empty for a band without dimensions or without energy.
  std::vector<double> BandMass(const Tile& tile, const std::vector<double>& q, const std::vector<uint8_t>& in) const {
    const auto squares = [&](const double* x, bool band) {
      double sum = 0;
      for (size_t d = 0; d < q.size(); ++d) sum += band && !in[d] ? 0 : x[d] * x[d];
      return sum;
    };
    double dims = 0, keys_band = 0, keys_all = 0;
    for (const uint8_t one : in) dims += one;
    for (int64_t b = 0; b < tile.visible; ++b) {
      const double all = squares(means_[b], false);
      if (!std::isfinite(all)) continue;
      keys_all += all;
      keys_band += squares(means_[b], true);
    }
    // With root mean squares r over the dimensions of the band and over all d of them, and d_b dimensions:
    // scores are q.k / (sqrt(d_b) tau), tau = sqrt(d_b / d) (r_q,b / r_q) (r_k,b / r_k).
    const double d = static_cast<double>(q.size());
    const double ratio_q = std::sqrt(squares(q.data(), true) / dims / (squares(q.data(), false) / d));
    const double ratio_k = std::sqrt(keys_band / dims / (keys_all / d));
    const double tau = std::sqrt(dims / d) * ratio_q * ratio_k;
    if (!(tau > 0) || !std::isfinite(tau)) return {};
    const double factor = head_.problem.softmax_scale * std::sqrt(d / dims) / tau;

    std::vector<double> z(static_cast<size_t>(tile.visible)), masked = q;
    for (size_t i = 0; i < q.size(); ++i) masked[i] = in[i] ? q[i] : 0;
    double largest = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t b = 0; b < tile.visible; ++b) {
      z[b] = factor * Dot(masked.data(), means_[b], means_.columns);
      if (std::isfinite(z[b])) largest = std::max(largest, z[b]);
    }
    for (double& x : z) {
      x = std::isfinite(x) ? std::exp(x - largest) : 0;
      sum += x;
    }
    if (!(sum > 0)) return {};
    for (double& x : z) x /= sum;
    return z;
  }

  HeadView head_;
  const fp_prism& policy_;
  RotaryBands bands_;
  Matrix means_;
};

} // namespace

extern const reference::Selector kReference = {Make<Prism>};

} // namespace flashprefill::methods::prism
