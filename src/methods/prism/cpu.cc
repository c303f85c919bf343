// Prism (arXiv 2602.08426) on the CPU. A band's product is that of all dimensions with a query whose other dimensions
// are zero, so both bands read the same panels of mean keys; two rows per tile are too few for that to matter.
#include <cmath>

#include "cpu/energies/pooled.h"
#include "cpu/top_p.h"
#include "methods/prism/rotary_bands.h"

namespace flashprefill::methods::prism {
namespace {

// Sums of squares of mean keys: over all dimensions, the high band's and the low band's.
struct Squares {
  double all, high, low;
};

class Selection : public cpu::PooledSelection {
 public:
  struct Scratch : PooledSelection::Scratch {
    uint64_t* picked; // [words]
  };

  explicit Selection(const cpu::SelectCall& call)
      : PooledSelection(call),
        policy_(reinterpret_cast<const fp_prism&>(call.policy)),
        bands_(RotaryBands::Of(policy_, call.p.head_dim)) {}

  void Take(Workspace& memory, int64_t panels) {
    PooledSelection::Take(memory, panels);
    squares_ = memory.Take<Squares>(panels * cpu::kPanelBlocks * call_.p.kv_heads);
  }

  Scratch TakeScratch(Workspace& memory) const {
    return {PooledSelection::TakeScratch(memory), memory.Take<uint64_t>(call_.g.words)};
  }

  void Describe(const cpu::SelectFrame& frame) const {
    PooledSelection::Describe(frame);
    frame.ForRuns([&](const cpu::BlockRun& run, Workspace) { SumSquares(frame, run); });
  }

  void Choose(const cpu::Item& item, const Scratch& scratch) const {
    ForRows(item, scratch, [&](const cpu::MaskRow& row, const float* mean) {
      for (const bool high : {true, false}) KeepBand(item, row, high, mean, scratch);
    });
  }

 private:
  void SumSquares(const cpu::SelectFrame& frame, const cpu::BlockRun& run) const {
    const float* panels = panels_.Of(frame, run.s, run.kv_head);
    Squares* squares = squares_ + BlockBegin(frame, run.s, run.kv_head);
    for (int64_t block = run.begin; block < run.end; ++block) {
      const float* mean = panels + block / cpu::kPanelBlocks * panels_.plan.panel_floats + cpu::kPanelBlocks +
                          block % cpu::kPanelBlocks;
      Squares sum{};
      for (int d = 0; d < call_.p.head_dim; ++d) {
        const double square = double{mean[d * cpu::kPanelBlocks]} * mean[d * cpu::kPanelBlocks];
        sum.all += square;
        if (bands_.InHigh(d)) sum.high += square;
        if (bands_.InLow(d)) sum.low += square;
      }
      squares[block] = std::isfinite(sum.all) ? sum : Squares{};
    }
  }

  // tau = sqrt(d_b / d) (r_q,b / r_q) (r_k,b / r_k), with r the root mean squares over the band and over all dimensions
  // of the tile's mean query, and of the mean keys of blocks that it sees.
  void KeepBand(const cpu::Item& item, const cpu::MaskRow& row, bool high, const float* mean,
                const Scratch& scratch) const {
    const int head_dim = call_.p.head_dim;
    const double d = head_dim;
    double dims = 0, q_all = 0, q_band = 0, k_all = 0, k_band = 0;
    for (int i = 0; i < head_dim; ++i) {
      const bool in = high ? bands_.InHigh(i) : bands_.InLow(i);
      scratch.row[i] = in ? mean[i] : 0;
      dims += in;
      q_all += double{mean[i]} * mean[i];
      if (in) q_band += double{mean[i]} * mean[i];
    }
    const Squares* squares = squares_ + BlockBegin(item.frame, item.s, item.kv_head);
    for (int64_t block = 0; block < row.tile.visible; ++block) {
      k_all += squares[block].all;
      k_band += high ? squares[block].high : squares[block].low;
    }
    const double tau =
        std::sqrt(dims / d) * std::sqrt(q_band / dims / (q_all / d)) * std::sqrt(k_band / dims / (k_all / d));
    if (!(tau > 0) || !std::isfinite(tau)) return; // a band without dimensions or without energy
    const float factor = static_cast<float>(std::sqrt(d / dims) / tau);
    for (int i = 0; i < head_dim; ++i) scratch.row[i] *= factor;

    Score(item, row.tile, scratch.row, scratch, [](int64_t) { return true; });
    FillRow(scratch.picked, call_.g.words, 0);
    cpu::TopP(scratch.energies, row.tile.visible, policy_.mass, scratch.keys, scratch.picked);
    for (int64_t w = 0; w < call_.g.words; ++w) row.bits[w] |= scratch.picked[w];
  }

  const fp_prism& policy_;
  const RotaryBands bands_;
  Squares* squares_ = nullptr; // [blocks]
};

} // namespace

extern const cpu::Selector kCpu = cpu::SelectorBy<Selection>();

} // namespace flashprefill::methods::prism
