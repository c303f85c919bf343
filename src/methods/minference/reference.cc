// MInference (arXiv 2407.02490): each head follows its own pattern, with numbers from a table. Choices of tokens are
// rounded out to the blocks that hold them, or become verticals and slashes of the mask.
//
//   vertical and slash: the softmax of the last min(64, Lq) query rows over all keys, by vertical and by slash; the
//       first 30 verticals and the nearest 100 slashes rank before all; the max(a, 30) best verticals are kept, and the
//       max(b, 50) best slashes
//   A-shape: the first a tokens, and of each row the nearest b
//   block-sparse: for each block of query rows the a best blocks by pooled score, its diagonal among them
//
// Blocks of queries are counted from the sequence's first query row, and a tile keeps what each of those that it
// overlaps would keep.
#include <algorithm>
#include <cmath>

#include "methods/minference/patterns.h"
#include "reference/selector.h"
#include "reference/vertical_slash.h"

namespace flashprefill::methods::minference {
namespace {

using namespace reference;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Count Exactly(int64_t count) { return {count, count, count}; }

class VerticalSlash : public HeadSelector {
 public:
  VerticalSlash(const HeadView& head, int64_t a, int64_t b)
      : VerticalSlash(head, a, b, SumVerticalSlash(head, kRows)) {}

  TileChoice Choose(const Tile& tile) const override {
    return ChooseBlocks(head_, tile, reinterpret_cast<const fp_minference&>(head_.policy).rounding, columns_,
                        distances_);
  }

  void ChooseVerticalSlash(std::vector<int32_t>& columns, std::vector<int32_t>& distances) const override {
    List(columns_, columns);
    List(distances_, distances);
  }

 private:
  VerticalSlash(const HeadView& head, int64_t a, int64_t b, VerticalSlashSums sums)
      : head_(head),
        columns_(Best(sums.column, kFirstVerticals, std::max(a, kFirstVerticals))),
        distances_(Best(sums.diagonal, kNearSlashes, std::max(b, kLeastSlashes))) {}

  static Chosen Best(std::vector<double>& sums, int64_t forced, int64_t count) {
    std::fill_n(sums.begin(), std::min(forced, static_cast<int64_t>(sums.size())), kInfinity);
    return Largest(sums, Exactly(count), kTokenTolerance);
  }

  HeadView head_;
  Chosen columns_, distances_;
};

class AShape : public HeadSelector {
 public:
  AShape(const HeadView& head, int64_t first, int64_t nearest) : head_(head), first_(first), nearest_(nearest) {}

  TileChoice Choose(const Tile& tile) const override {
    TileChoice choice;
    choice.energy.resize(static_cast<size_t>(tile.visible));
    choice.scored.assign(static_cast<size_t>(tile.visible), 1);
    choice.near_tie.resize(static_cast<size_t>(tile.visible));
    const int64_t size = head_.geometry.block_size, position = head_.sequence.prefix + tile.begin;
    for (int64_t b = 0; b < tile.visible; ++b) {
      choice.kept.push_back(b * size < first_ || (b + 1) * size > position - nearest_ + 1);
    }
    return choice;
  }

 private:
  HeadView head_;
  int64_t first_, nearest_;
};

class BlockSparse : public HeadSelector {
 public:
  BlockSparse(const HeadView& head, int64_t count) : head_(head) {
    const Matrix means = BlockMeans(head.geometry, head.sequence, head.keys, head.problem.k.dtype);
    const Matrix logits = PooledLogits(head, means);
    const double tolerance = ScoreTolerance(head.problem);
    for (int64_t r = 0; r < logits.rows; ++r) {
      std::vector<double> energy(logits[r], logits[r] + logits.columns);
      const double largest = *std::max_element(energy.begin(), energy.end());
      // Ranks are those of the logits; as energies they have the usual tolerance.
      for (double& z : energy) z = z == -kInfinity ? z : std::max(std::exp(z - largest), 1e-300);
      rows_.push_back(Largest(energy, Exactly(count), tolerance));
    }
  }

  TileChoice Choose(const Tile& tile) const override {
    TileChoice choice;
    choice.energy.resize(static_cast<size_t>(tile.visible));
    choice.scored.assign(static_cast<size_t>(tile.visible), 1);
    choice.kept.resize(static_cast<size_t>(tile.visible));
    choice.near_tie.resize(static_cast<size_t>(tile.visible));
    const QueryBlocks rows(head_.geometry, tile);
    for (int64_t b = 0; b < tile.visible; ++b) {
      bool least = false, most = false;
      for (int64_t r = rows.first; r <= rows.last; ++r) {
        choice.kept[b] |= rows_[r].kept[b];
        least |= rows_[r].least[b];
        most |= rows_[r].most[b];
      }
      choice.near_tie[b] = most && !least;
    }
    return choice;
  }

 private:
  HeadView head_;
  std::vector<Chosen> rows_;
};

std::unique_ptr<HeadSelector> MakeSelector(const HeadView& head) {
  const fp_minference_head own = PatternOf(reinterpret_cast<const fp_minference&>(head.policy), head.first_head);
  switch (own.pattern) {
    case FP_A_SHAPE:
      return std::make_unique<AShape>(head, own.a, own.b);
    case FP_BLOCK_SPARSE:
      return std::make_unique<BlockSparse>(head, own.a);
    default:
      return std::make_unique<VerticalSlash>(head, own.a, own.b);
  }
}

} // namespace

extern const reference::Selector kReference = {MakeSelector};

} // namespace flashprefill::methods::minference
