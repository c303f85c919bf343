// SpargeAttn's first stage (arXiv 2502.18137): the means of self-similar blocks predict the softmax. Blocks without
// self-similarity are kept.
#include <algorithm>
#include <cmath>

#include "methods/sparge_attn/rules.h"
#include "reference/selector.h"
#include "reference/top_p.h"

namespace flashprefill::methods::sparge_attn {
namespace {

using namespace reference;

// The mean of all entries of the cosine matrix of rows [begin, end) minus `center`, which is the squared length of the
// mean of their unit vectors. A row of length zero has the unit vector zero.
double SelfSimilarity(const Matrix& m, int64_t begin, int64_t end, const std::vector<double>& center) {
  std::vector<double> sum(static_cast<size_t>(m.columns)), row(sum.size());
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t d = 0; d < m.columns; ++d) row[d] = m[r][d] - center[d];
    const double length = std::sqrt(Dot(row.data(), row.data(), m.columns));
    for (int64_t d = 0; d < m.columns && length != 0; ++d) sum[d] += row[d] / length;
  }
  const double n = static_cast<double>(end - begin);
  return Dot(sum.data(), sum.data(), m.columns) / (n * n);
}

class SpargeAttn : public HeadSelector {
 public:
  explicit SpargeAttn(const HeadView& head)
      : head_(head),
        policy_(reinterpret_cast<const fp_sparge_attn&>(head.policy)),
        means_(BlockMeans(head.geometry, head.sequence, head.keys, head.problem.k.dtype)) {
    // Keys without their mean over the sequence. Scores don't need it: it adds the same to all scores of a row.
    const Matrix& keys = head.keys;
    std::vector<double> center(static_cast<size_t>(keys.columns));
    for (int64_t t = 0; t < keys.rows; ++t) {
      for (int64_t d = 0; d < keys.columns; ++d) center[d] += keys[t][d] / static_cast<double>(keys.rows);
    }
    for (int64_t b = 0; b < means_.rows; ++b) {
      const int64_t begin = b * head.geometry.block_size;
      similarity_.push_back(SelfSimilarity(keys, begin, begin + head.geometry.BlockKeys(head.sequence, b), center));
    }
  }

  TileChoice Choose(const Tile& tile) const override {
    const double tolerance = ScoreTolerance(head_.problem);
    const Matrix& queries = head_.queries.front();
    TileChoice choice;
    choice.energy.resize(static_cast<size_t>(tile.visible));
    choice.scored.assign(choice.energy.size(), 1);
    choice.kept.assign(choice.energy.size(), 0);
    choice.near_tie = choice.kept;

    bool doubtful = false; // whether a block is self-similar: then every score of the tile is in doubt
    const auto similar = [&](double similarity) {
      doubtful |= std::abs(similarity - SimilarityOf(policy_)) <= 1e-4; // no mean that is rounded to 16 bits is in it
      return similarity > SimilarityOf(policy_);
    };
    const bool dense = !similar(
        SelfSimilarity(queries, tile.begin, tile.end, std::vector<double>(static_cast<size_t>(queries.columns))));

    std::vector<double> q(static_cast<size_t>(queries.columns)), z(choice.energy.size());
    MeanOfRows(queries, tile.begin, tile.end, head_.problem.q.dtype, q.data());
    double largest = -std::numeric_limits<double>::infinity();
    for (int64_t b = 0; b < tile.visible; ++b) {
      z[b] = head_.problem.softmax_scale * Dot(q.data(), means_[b], means_.columns);
      choice.scored[b] = similar(similarity_[b]);
      if (choice.scored[b] && std::isfinite(z[b])) largest = std::max(largest, z[b]);
    }
    for (int64_t b = 0; b < tile.visible; ++b) {
      if (choice.scored[b] && std::isfinite(z[b])) choice.energy[b] = std::exp(z[b] - largest);
    }
    // Ranks are among blocks that have a score.
    std::vector<int64_t> ranked;
    std::vector<double> mass;
    for (int64_t b = 0; b < tile.visible; ++b) {
      if (choice.scored[b]) ranked.push_back(b), mass.push_back(choice.energy[b]);
    }
    const int64_t blocks = head_.geometry.Blocks(head_.sequence);
    const Verdict verdict = std::isnan(policy_.cdf) ? TopK(mass, TopBlocks(policy_, blocks), tolerance)
                                                    : TopPExclusive(mass, policy_.cdf, tolerance);
    for (size_t i = 0; i < ranked.size(); ++i) {
      choice.kept[ranked[i]] = verdict.kept[i];
      choice.near_tie[ranked[i]] = verdict.near_tie[i];
    }
    for (int64_t b = 0; b < tile.visible; ++b) {
      if (dense || !choice.scored[b]) choice.kept[b] = 1, choice.near_tie[b] = 0;
      if (doubtful) choice.near_tie[b] = 1;
    }
    return choice;
  }

 private:
  HeadView head_;
  const fp_sparge_attn& policy_;
  Matrix means_;
  std::vector<double> similarity_;
};

} // namespace

extern const reference::Selector kReference = {Make<SpargeAttn>};

} // namespace flashprefill::methods::sparge_attn
