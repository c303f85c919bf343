// XAttention (arXiv 2503.16428): a pair of cells is scored by the sum over its antidiagonal. So every query and every
// key of the two counts once, and every vertical and slash through them is crossed.
#include "reference/selector.h"
#include "reference/strided.h"
#include "reference/top_p.h"

namespace flashprefill::methods::xattention {
namespace {

using namespace reference;

class XAttention : public HeadSelector {
 public:
  explicit XAttention(const HeadView& head)
      : head_(head), policy_(reinterpret_cast<const fp_xattention&>(head.policy)), cells_(KeyCells()) {}

  // Cells of queries begin at the tile's first token. One that ends before its stride does is padded with zeros, and
  // stands at its last query.
  TileChoice Choose(const Tile& tile) const override {
    const int64_t d = head_.keys.columns, stride = policy_.stride;
    const Matrix& queries = head_.queries.front();
    std::vector<StridedRow> rows;
    for (int64_t begin = tile.begin; begin < tile.end; begin += stride) {
      const int64_t end = std::min(begin + stride, tile.end);
      const int64_t last = head_.problem.causal ? head_.sequence.prefix + end - 1 : head_.keys.rows - 1;
      StridedRow row{last / stride, std::vector<double>(static_cast<size_t>(stride * d))};
      for (int64_t t = 0; t < stride; ++t) { // key t meets query stride - 1 - t
        const int64_t i = begin + stride - 1 - t;
        if (i < end) std::copy_n(queries[i], d, row.q.data() + t * d);
      }
      rows.push_back(std::move(row));
    }
    const double factor = head_.problem.softmax_scale / (static_cast<double>(stride) * policy_.norm);
    TileChoice choice;
    choice.energy = StridedMass(cells_, rows, factor, head_.geometry.block_size / stride, tile.visible);
    choice.scored.assign(choice.energy.size(), 1);
    std::vector<uint8_t> forced;
    for (int64_t b = 0; b < tile.visible; ++b) forced.push_back(IsForced(head_.policy, tile, b));
    const double share = policy_.head_count > 0 ? policy_.head_thresholds[head_.first_head] : policy_.threshold;
    Verdict verdict = TopP(choice.energy, share, forced, ScoreTolerance(head_.problem));
    choice.kept = std::move(verdict.kept);
    choice.near_tie = std::move(verdict.near_tie);
    return choice;
  }

 private:
  // The keys of each cell, concatenated; zeros past the sequence's end.
  Matrix KeyCells() const {
    const int64_t d = head_.keys.columns;
    Matrix cells(DivUp<int64_t>(head_.keys.rows, policy_.stride), policy_.stride * d);
    std::copy(head_.keys.data.begin(), head_.keys.data.end(), cells.data.begin());
    return cells;
  }

  HeadView head_;
  const fp_xattention& policy_;
  Matrix cells_;
};

} // namespace

extern const reference::Selector kReference = {Make<XAttention>};

} // namespace flashprefill::methods::xattention
