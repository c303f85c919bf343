// RRAttention (arXiv 2602.05853): one query of each cell is scored against the means of cells of keys. Each head takes
// another query of the cell, so that together the heads sample all of them.
#include "reference/selector.h"
#include "reference/strided.h"
#include "reference/top_p.h"

namespace flashprefill::methods::rrattention {
namespace {

using namespace reference;

class RRAttention : public HeadSelector {
 public:
  explicit RRAttention(const HeadView& head)
      : head_(head), policy_(reinterpret_cast<const fp_rrattention&>(head.policy)), cells_(KeyCells()) {}

  // Cells of queries begin at the tile's first token; if the place
  // is past the end of a short cell, its last query is taken.
  TileChoice Choose(const Tile& tile) const override {
    const int64_t stride = policy_.stride;
    const Matrix& queries = head_.queries.front();
    const int64_t place = stride - 1 - head_.first_head % stride;
    std::vector<StridedRow> rows;
    for (int64_t begin = tile.begin; begin < tile.end; begin += stride) {
      const int64_t i = std::min(begin + place, tile.end - 1);
      rows.push_back(
          {(head_.sequence.prefix + i) / stride, std::vector<double>(queries[i], queries[i] + queries.columns)});
    }
    TileChoice choice;
    choice.energy =
        StridedMass(cells_, rows, head_.problem.softmax_scale, head_.geometry.block_size / stride, tile.visible);
    choice.scored.assign(choice.energy.size(), 1);
    Verdict verdict = TopP(choice.energy, policy_.threshold, {}, ScoreTolerance(head_.problem));
    choice.kept = std::move(verdict.kept);
    choice.near_tie = std::move(verdict.near_tie);
    return choice;
  }

 private:
  Matrix KeyCells() const {
    const Matrix& keys = head_.keys;
    Matrix cells(DivUp<int64_t>(keys.rows, policy_.stride), keys.columns);
    for (int64_t j = 0; j < cells.rows; ++j) {
      const int64_t begin = j * policy_.stride;
      MeanOfRows(keys, begin, std::min(begin + policy_.stride, keys.rows), head_.problem.k.dtype, cells[j]);
    }
    return cells;
  }

  HeadView head_;
  const fp_rrattention& policy_;
  Matrix cells_;
};

} // namespace

extern const reference::Selector kReference = {Make<RRAttention>};

} // namespace flashprefill::methods::rrattention
