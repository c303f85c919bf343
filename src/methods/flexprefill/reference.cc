// FlexPrefill (arXiv 2502.20766), its rounding rules as its authors' code has them. One head at a time:
//
//   the last min(B, Lq) query rows' softmax over all keys, summed by vertical and by slash
//   budgets: how many tokens of each hold gamma of it, as blocks: count / 128 + 1, between minb and maxb blocks
//   the pattern: softmax of (mean of those rows . mean of each key block) against the verticals summed to blocks
//   query-aware if their Jensen-Shannon distance is below tau; both budgets are minb then
//   kept: the best verticals and slashes of blocks, the first of each always; and if query-aware, the largest
//   entries of the whole map of pooled softmax, up to the one that would pass gamma of the map
//
// The authors' code takes whole sequences and tiles as large as blocks. Here blocks of queries are counted from the
// sequence's first query row, and a tile keeps what each block of queries that it overlaps would keep. A slash is kept
// for each block that holds some of the tile's positions.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "reference/selector.h"
#include "reference/vertical_slash.h"

namespace flashprefill::methods::flexprefill {
namespace {

using namespace reference;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kBudgetTokens = 128; // tokens per block in their budgets, whatever the block size

// 1 + how many of the values, largest first, sum to at most gamma.
int64_t CountTo(const std::vector<double>& falling, double gamma) {
  double sum = 0;
  int64_t count = 1;
  for (const double x : falling) {
    sum += x;
    count += sum <= gamma;
  }
  return count;
}

double JensenShannonDistance(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double m = (a[i] + b[i]) / 2;
    if (a[i] > 0) sum += a[i] * std::log(a[i] / m) / 2; // 0 ln 0 = 0
    if (b[i] > 0) sum += b[i] * std::log(b[i] / m) / 2;
  }
  return std::sqrt(std::max(sum, 0.0));
}

void Softmax(const double* z, int64_t n, double* share) {
  const double largest = *std::max_element(z, z + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += share[i] = std::isfinite(z[i]) ? std::exp(z[i] - largest) : 0;
  for (int64_t i = 0; i < n && sum > 0; ++i) share[i] /= sum;
}

class FlexSelector : public HeadSelector {
 public:
  explicit FlexSelector(const HeadView& head)
      : head_(head),
        policy_(reinterpret_cast<const fp_flexprefill&>(head.policy)),
        blocks_(head.geometry.Blocks(head.sequence)),
        key_means_(BlockMeans(head.geometry, head.sequence, head.keys, head.problem.k.dtype)) {
    const VerticalSlashSums sums = SumVerticalSlash(head, Size());
    by_column_.resize(static_cast<size_t>(blocks_));
    std::vector<double> by_distance(static_cast<size_t>(blocks_));
    for (int64_t t = 0; t < K(); ++t) {
      by_column_[t / Size()] += sums.column[t];
      by_distance[BlockDistance(t)] += sums.diagonal[t];
    }
    const double distance = JensenShannonDistance(Foretold(), by_column_), tolerance = ScoreTolerance(head.problem);
    query_aware_ = distance < policy_.tau;
    pattern_near_tie_ = std::abs(distance - policy_.tau) <= tolerance && policy_.tau > 0;

    const int64_t least = std::max<int64_t>(1, DivUp<int64_t>(policy_.min_budget, Size()));
    const auto lines_of = [&](std::vector<double> blocks, const Count& count) {
      blocks[0] = kInfinity;
      return Largest(blocks, count, kTokenTolerance);
    };
    if (!query_aware_ || pattern_near_tie_) {
      patterns_.push_back({lines_of(by_column_, Budget(sums.column, least)),
                           lines_of(by_distance, Budget(sums.diagonal, least)), Chosen(0)});
    }
    if (query_aware_ || pattern_near_tie_) {
      const Count fixed{least, least, least};
      patterns_.push_back({lines_of(by_column_, fixed), lines_of(by_distance, fixed), QueryAware(tolerance)});
    }
    if (query_aware_ && pattern_near_tie_) std::swap(patterns_[0], patterns_[1]); // what is kept comes first
  }

  TileChoice Choose(const Tile& tile) const override {
    TileChoice choice;
    choice.energy.assign(by_column_.begin(), by_column_.begin() + tile.visible);
    choice.scored.assign(static_cast<size_t>(tile.visible), 1);
    choice.kept.resize(static_cast<size_t>(tile.visible));
    choice.near_tie.resize(static_cast<size_t>(tile.visible));
    for (int64_t b = 0; b < tile.visible; ++b) {
      choice.kept[b] = Keeps(patterns_[0], &Chosen::kept, tile, b);
      bool least = true, most = false;
      for (const Pattern& pattern : patterns_) {
        least &= Keeps(pattern, &Chosen::least, tile, b);
        most |= Keeps(pattern, &Chosen::most, tile, b);
      }
      choice.near_tie[b] = most && !least;
    }
    return choice;
  }

 private:
  // What a pattern chooses. The map has an entry for each (block of queries, block of keys), or none.
  struct Pattern {
    Chosen columns, diagonals, map;
  };

  int64_t Size() const { return head_.geometry.block_size; }
  int64_t K() const { return head_.sequence.k_len; }

  // The diagonal of blocks that tokens at this distance belong to: the one that the last row finds them in. With both,
  // blocks at distance d and d + 1 are crossed, d = distance / B.
  int64_t BlockDistance(int64_t distance) const {
    if (policy_.cover == FP_COVER_BOTH) return distance / Size();
    return blocks_ - 1 - (K() - 1 - distance) / Size();
  }

  Count Budget(std::vector<double> sums, int64_t least) const {
    const int64_t most =
        policy_.max_budget == 0 ? blocks_ : std::min(blocks_, DivUp<int64_t>(policy_.max_budget, Size()));
    std::sort(sums.begin(), sums.end(), std::greater<>());
    const auto blocks = [&](double gamma) {
      const int64_t tokens = gamma >= 1 ? K() : CountTo(sums, gamma); // everything
      return std::min(std::max(tokens / kBudgetTokens + 1, least), most);
    };
    return {blocks(policy_.gamma), blocks(policy_.gamma - kTokenTolerance), blocks(policy_.gamma + kTokenTolerance)};
  }

  // The verticals that pooled keys predict: softmax of the mean row against the mean key of each block.
  std::vector<double> Foretold() const {
    const Sequence& s = head_.sequence;
    const Matrix& queries = head_.queries.front();
    std::vector<double> mean(static_cast<size_t>(queries.columns)), z(static_cast<size_t>(blocks_)), share(z.size());
    MeanOfRows(queries, std::max<int64_t>(0, s.q_len - Size()), s.q_len, head_.problem.q.dtype, mean.data());
    for (int64_t c = 0; c < blocks_; ++c) {
      z[c] = head_.problem.softmax_scale * Dot(mean.data(), key_means_[c], queries.columns);
      if (!std::isfinite(z[c])) z[c] = -kInfinity;
    }
    Softmax(z.data(), blocks_, share.data());
    return share;
  }

  // The largest entries of the map whose sum stays at or below gamma of it: the one that crosses is not kept.
  Chosen QueryAware(double tolerance) const {
    const Matrix logits = PooledLogits(head_, key_means_);
    Matrix map(logits.rows, logits.columns);
    for (int64_t r = 0; r < map.rows; ++r) Softmax(logits[r], map.columns, map[r]);
    std::vector<int64_t> order(map.data.size());
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return map.data[a] > map.data[b]; });
    Chosen chosen(map.data.size());
    const double rows = static_cast<double>(map.rows), gamma = policy_.gamma;
    double sum = 0, sum_before = 0, sum_perhaps = 0;
    size_t before = 0, perhaps = 0;
    for (const int64_t i : order) {
      const double x = map.data[i];
      sum += x;
      while (before < order.size() && map.data[order[before]] > x * (1 + tolerance) + 1e-35)
        sum_before += map.data[order[before++]];
      while (perhaps < order.size() && map.data[order[perhaps]] >= x * (1 - tolerance) - 1e-35)
        sum_perhaps += map.data[order[perhaps++]];
      chosen.kept[i] = gamma >= 1 || sum <= gamma * rows;
      chosen.least[i] = gamma >= 1 || sum_perhaps <= (gamma - tolerance) * rows;
      chosen.most[i] = gamma >= 1 || sum_before + x <= (gamma + tolerance) * rows;
    }
    return chosen;
  }

  bool Keeps(const Pattern& pattern, std::vector<uint8_t> Chosen::*level, const Tile& tile, int64_t block) const {
    if ((pattern.columns.*level)[block]) return true;
    const int64_t first = (head_.sequence.prefix + tile.begin) / Size();
    const int64_t last = (head_.sequence.prefix + tile.end - 1) / Size();
    const std::vector<uint8_t>& diagonals = pattern.diagonals.*level;
    for (int64_t position = std::max(first, block); position <= last; ++position) {
      const int64_t distance = position - block;
      if (diagonals[distance]) return true;
      if (policy_.cover == FP_COVER_BOTH && distance > 0 && diagonals[distance - 1]) return true;
    }
    if (pattern.map.kept.empty()) return false;
    const QueryBlocks rows(head_.geometry, tile);
    for (int64_t r = rows.first; r <= rows.last; ++r) {
      if ((pattern.map.*level)[r * blocks_ + block]) return true;
    }
    return false;
  }

  HeadView head_;
  const fp_flexprefill& policy_;
  int64_t blocks_;
  Matrix key_means_;
  std::vector<double> by_column_;
  bool query_aware_ = false, pattern_near_tie_ = false;
  std::vector<Pattern> patterns_; // the head's pattern, and the other one if the test is too close to call
};

} // namespace

extern const reference::Selector kReference = {Make<FlexSelector>};

} // namespace flashprefill::methods::flexprefill
