// Prism (arXiv 2602.08426) on the CPU. A band's product is that of all dimensions with a query whose other dimensions
// are zero, so both bands read the same panels of mean keys; two rows a tile are too few for that to matter.
#include <cmath>

#include "cpu/policies.h"
#include "cpu/pooled.h"
#include "methods/prism/rotary_bands.h"

namespace flashprefill::cpu {
namespace {

// Sums of squares of mean keys: over all dimensions, the high band's and the low band's.
struct Squares {
  double all, high, low;
};

class PrismSelection {
 public:
  PrismSelection(const Problem& p, const Policy& policy, const Exec& exec, void* workspace)
      : p_(p),
        policy_(reinterpret_cast<const fp_prism&>(policy)),
        bands_(methods::prism::RotaryBands::Of(policy_, p.head_dim)),
        parts_(workspace),
        pooled_(p, policy, exec, 0, parts_),
        squares_(parts_.Take<Squares>(pooled_.blocks() * p.kv_heads)) {}

  size_t bytes() const { return parts_.used(); }

  void Run(BlockMask& mask) {
    pooled_.Describe();
    pooled_.ForRuns([&](const Pooled::Run& r, const Pooled::Scratch&) { SumSquares(r); });
    pooled_.ForTiles(
        mask, [&](const Pooled::Item& item, int, const float* mean, const Pooled::Scratch& scratch, uint64_t* row) {
          for (const bool high : {true, false}) KeepBand(item, high, mean, scratch, row);
        });
  }

 private:
  void SumSquares(const Pooled::Run& r) const {
    const SelectPlan& plan = pooled_.plan();
    const float* panels = pooled_.PanelsOf(r.b, r.s, r.kv_head);
    for (int64_t block = r.begin; block < r.end; ++block) {
      const float* mean = panels + block / kPanelBlocks * plan.panel_floats + kPanelBlocks + block % kPanelBlocks;
      Squares sum{};
      for (int d = 0; d < p_.head_dim; ++d) {
        const double square = double{mean[d * kPanelBlocks]} * mean[d * kPanelBlocks];
        sum.all += square;
        if (bands_.InHigh(d)) sum.high += square;
        if (bands_.InLow(d)) sum.low += square;
      }
      squares_[pooled_.BlocksOf(r.b, r.kv_head) + block] = std::isfinite(sum.all) ? sum : Squares{};
    }
  }

  // tau = sqrt(d_b / d) (r_q,b / r_q) (r_k,b / r_k), with r the root mean squares over the band and over all dimensions
  // of the tile's mean query, and of the mean keys of blocks that it sees.
  void KeepBand(const Pooled::Item& item, bool high, const float* mean, const Pooled::Scratch& scratch,
                uint64_t* row) const {
    const double d = p_.head_dim;
    double dims = 0, q_all = 0, q_band = 0, k_all = 0, k_band = 0;
    for (int i = 0; i < p_.head_dim; ++i) {
      const bool in = high ? bands_.InHigh(i) : bands_.InLow(i);
      scratch.row[i] = in ? mean[i] : 0;
      dims += in;
      q_all += double{mean[i]} * mean[i];
      if (in) q_band += double{mean[i]} * mean[i];
    }
    const Squares* squares = squares_ + pooled_.BlocksOf(item.b, item.kv_head);
    for (int64_t block = 0; block < item.tile.visible; ++block) {
      k_all += squares[block].all;
      k_band += high ? squares[block].high : squares[block].low;
    }
    const double tau =
        std::sqrt(dims / d) * std::sqrt(q_band / dims / (q_all / d)) * std::sqrt(k_band / dims / (k_all / d));
    if (!(tau > 0) || !std::isfinite(tau)) return; // a band without dimensions or without energy
    const float factor = static_cast<float>(std::sqrt(d / dims) / tau);
    for (int i = 0; i < p_.head_dim; ++i) scratch.row[i] *= factor;

    pooled_.Score(item, scratch.row, scratch, [](int64_t) { return true; });
    const int64_t words = pooled_.plan().g.words;
    FillRow(scratch.picked, words, 0);
    TopP(scratch.energies, item.tile.visible, policy_.mass, scratch.keys, scratch.picked);
    for (int64_t w = 0; w < words; ++w) row[w] |= scratch.picked[w];
  }

  const Problem& p_;
  const fp_prism& policy_;
  const methods::prism::RotaryBands bands_;
  Workspace parts_;
  Pooled pooled_;
  Squares* squares_; // [blocks of all sequences][kv_heads]
};

} // namespace

size_t PrismWorkspace(const Problem& p, const Policy& policy, const Exec& exec) {
  return PrismSelection(p, policy, exec, nullptr).bytes();
}

void SelectPrism(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace) {
  PrismSelection(p, policy, exec, workspace).Run(mask);
}

} // namespace flashprefill::cpu
