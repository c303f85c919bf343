// SampleAttention (arXiv 2406.15486): sampled rows attend to all their keys. Their mass per key block and per distance
// in blocks decides which verticals and slashes of blocks the head keeps.
#include "methods/sample_attention/row_sample.h"
#include "reference/selector.h"
#include "reference/strided.h"
#include "reference/top_p.h"

namespace flashprefill::methods::sample_attention {
namespace {

using namespace reference;

class SampleAttention : public HeadSelector {
 public:
  explicit SampleAttention(const HeadView& head)
      : head_(head), policy_(reinterpret_cast<const fp_sample_attention&>(head.policy)) {
    const Sequence& s = head.sequence;
    const Matrix& queries = head.queries.front();
    const int64_t blocks = head.geometry.Blocks(s), size = head.geometry.block_size;
    std::vector<double> columns(static_cast<size_t>(blocks)), diagonals(columns.size());
    const RowSample sample = SampleOf(policy_, s);
    for (int64_t segment = 0; segment < sample.segments; ++segment) {
      for (int64_t i = sample.Begin(segment); i < sample.End(segment); ++i) {
        const int64_t own = (s.prefix + i) / size;
        const std::vector<StridedRow> row{
            {s.prefix + i, std::vector<double>(queries[i], queries[i] + queries.columns)}};
        const std::vector<double> mass = StridedMass(head.keys, row, head.problem.softmax_scale, size, own + 1);
        for (int64_t b = 0; b <= own; ++b) {
          columns[b] += mass[b];
          diagonals[own - b] += mass[b];
        }
      }
    }
    columns_ = TopP(columns, policy_.coverage, {}, ScoreTolerance(head.problem));
    diagonals_ = TopP(diagonals, policy_.coverage, {}, ScoreTolerance(head.problem));
    mass_ = std::move(columns);
  }

  TileChoice Choose(const Tile& tile) const override {
    const int64_t window = WindowBegin(policy_, head_.sequence, tile, head_.geometry.block_size);
    TileChoice choice;
    choice.energy.assign(mass_.begin(), mass_.begin() + tile.visible);
    choice.scored.assign(choice.energy.size(), 1);
    for (int64_t b = 0; b < tile.visible; ++b) {
      bool sure = b >= window, maybe = false;
      const auto ask = [&](const Verdict& verdict, int64_t item) {
        sure |= verdict.kept[item] && !verdict.near_tie[item];
        maybe |= verdict.kept[item];
        return verdict.near_tie[item] != 0;
      };
      bool open = ask(columns_, b);
      for (int64_t own = tile.diagonal; own < tile.visible; ++own) { // the blocks that hold the tile's rows
        if (own >= b) open |= ask(diagonals_, own - b);
      }
      choice.kept.push_back(sure || maybe);
      choice.near_tie.push_back(!sure && open);
    }
    return choice;
  }

 private:
  HeadView head_;
  const fp_sample_attention& policy_;
  Verdict columns_, diagonals_;
  std::vector<double> mass_;
};

} // namespace

extern const reference::Selector kReference = {Make<SampleAttention>};

} // namespace flashprefill::methods::sample_attention
