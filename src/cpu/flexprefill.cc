// FlexPrefill's choice for one head: see reference/flexprefill.cc for the rules, docs/methods/flexprefill.md for why.
#include <cmath>

#include "cpu/radix_threshold.h"
#include "cpu/vertical_slash.h"

namespace flashprefill::cpu {
namespace {

constexpr int64_t kBudgetTokens = 128; // tokens that its authors take for a block's, whatever the block size

class FlexPrefill {
 public:
  explicit FlexPrefill(const HeadCall& call)
      : call_(call), policy_(reinterpret_cast<const fp_flexprefill&>(call.policy)), t_(call.scratch) {}

  void Choose() {
    SumVerticalSlash(call_, Size(), true);
    int64_t columns = Budget(t_.column), diagonals = Budget(t_.diagonal);
    SumToBlocks();
    const bool query_aware = JensenShannonDistance() < policy_.tau;
    if (query_aware) columns = diagonals = Least();

    const int64_t words = call_.g.words, tiles = call_.g.Tiles(call_.s);
    std::fill_n(t_.columns, DivUp<int64_t>(call_.blocks(), 64), uint64_t{0});
    const int64_t kept = Best(t_.column, 1, call_.blocks(), 1, columns, t_.ranks);
    for (int64_t i = 0; i < kept; ++i) SetBit(t_.columns, static_cast<int64_t>(t_.ranks[i]));
    const int64_t lines = Best(t_.diagonal, 1, call_.blocks(), 1, diagonals, t_.ranks);
    for (int64_t m = 0; m < tiles; ++m) {
      uint64_t* row = call_.Row(m);
      FillRow(row, words, 0);
      std::copy_n(t_.columns, DivUp<int64_t>(call_.blocks(), 64), row);
      for (int64_t i = 0; i < lines; ++i) KeepDiagonal(m, static_cast<int64_t>(t_.ranks[i]), row);
    }
    if (query_aware) KeepByMap();
  }

 private:
  int64_t Size() const { return call_.block_size(); }
  int64_t Least() const { return std::max<int64_t>(1, DivUp<int64_t>(policy_.min_budget, Size())); }

  // Blocks for the tokens, largest first, that hold gamma of a line's sums.
  int64_t Budget(const float* sums) const {
    const int64_t n = call_.s.k_len, blocks = call_.blocks();
    int64_t tokens = n;
    if (policy_.gamma < 1) {
      const RadixThreshold crossing = FindRadixThreshold(policy_.gamma, [&](const auto& visit) {
        for (int64_t i = 0; i < n; ++i) visit(sums[i]);
      });
      tokens = (crossing.crosses ? crossing.count() : n) + 1;
    }
    const int64_t most =
        policy_.max_budget == 0 ? blocks : std::min(blocks, DivUp<int64_t>(policy_.max_budget, Size()));
    return std::min(std::max(tokens / kBudgetTokens + 1, Least()), most);
  }

  // column[c] and diagonal[d] become those of blocks. A diagonal's index counts from the far end, so what the last row
  // finds in one block is one run of it; with both covers, what is floor(distance / B) apart.
  void SumToBlocks() const {
    const int64_t n = call_.s.k_len, blocks = call_.blocks();
    const auto sum = [](const float* from, int64_t count) {
      double total = 0;
      for (int64_t i = 0; i < count; ++i) total += from[i];
      return static_cast<float>(total);
    };
    for (int64_t c = 0; c < blocks; ++c) t_.column[c] = sum(t_.column + c * Size(), call_.g.BlockKeys(call_.s, c));
    const bool from_end = policy_.cover == FP_COVER_BOTH;
    if (from_end) std::reverse(t_.diagonal, t_.diagonal + n);
    for (int64_t c = 0; c < blocks; ++c) t_.diagonal[c] = sum(t_.diagonal + c * Size(), call_.g.BlockKeys(call_.s, c));
    if (!from_end) std::reverse(t_.diagonal, t_.diagonal + blocks);
  }

  double JensenShannonDistance() const {
    const int64_t blocks = call_.blocks(), depth = call_.p.head_dim;
    float* mean = t_.panels;
    MeanQueries(call_, std::max<int64_t>(0, call_.s.q_len - Size()), call_.s.q_len, mean);
    const auto logit = [&](int64_t c) {
      const float* key = t_.key_means + c * depth;
      double z = 0;
      for (int64_t i = 0; i < depth; ++i) z += double{mean[i]} * key[i];
      z *= call_.p.softmax_scale;
      return std::isfinite(z) ? z : -std::numeric_limits<double>::infinity();
    };
    double largest = -std::numeric_limits<double>::infinity(), total = 0;
    for (int64_t c = 0; c < blocks; ++c) largest = std::max(largest, logit(c));
    if (largest > -std::numeric_limits<double>::infinity()) {
      for (int64_t c = 0; c < blocks; ++c) total += std::exp(logit(c) - largest);
    }
    double sum = 0;
    for (int64_t c = 0; c < blocks; ++c) {
      const double a = total > 0 ? std::exp(logit(c) - largest) / total : 0, b = t_.column[c], m = (a + b) / 2;
      if (a > 0) sum += a * std::log(a / m) / 2;
      if (b > 0) sum += b * std::log(b / m) / 2;
    }
    return std::sqrt(std::max(sum, 0.0));
  }

  // The blocks of a tile at a distance of blocks from its positions.
  void KeepDiagonal(int64_t m, int64_t distance, uint64_t* row) const {
    const int64_t begin = call_.s.prefix + m * call_.g.tile_tokens;
    const int64_t end = std::min(begin + call_.g.tile_tokens, call_.s.k_len);
    const int64_t wide = policy_.cover == FP_COVER_BOTH;
    const int64_t last = (end - 1) / Size() - distance;
    for (int64_t b = std::max<int64_t>(0, begin / Size() - distance - wide); b <= last; ++b) SetBit(row, b);
  }

  // The largest entries of the whole map of pooled softmax, up to gamma of it. The map is computed anew for each look
  // at it: denominators, three digits of the threshold, bits.
  void KeepByMap() const {
    PoolQueries(call_);
    const int64_t n = call_.query_blocks(), panels = DivUp<int64_t>(n, kPanelRows);
    for (int64_t panel = 0; panel < panels; ++panel) {
      std::fill_n(t_.largest, kPanelRows, kLeastScore);
      std::fill_n(t_.sums, kPanelRows, 0.f);
      ForPooledScores(call_, panel, [&](const ScoreChunk& c) { call_.kernels.add_to_sums(c, t_.largest, t_.sums); });
      for (int lane = 0; lane < kPanelRows; ++lane) {
        t_.query_reference[panel * kPanelRows + lane] =
            t_.sums[lane] > 0 ? t_.largest[lane] + std::log2(t_.sums[lane]) : std::numeric_limits<float>::infinity();
      }
    }
    // visit(block of query rows, key block, share)
    const auto for_map = [&](const auto& visit) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t rows = std::min<int64_t>(kPanelRows, n - panel * kPanelRows);
        ForPooledScores(call_, panel, [&](const ScoreChunk& c) {
          call_.kernels.share(c, t_.query_reference + panel * kPanelRows);
          for (int64_t key = 0; key < c.count; ++key) {
            for (int64_t r = 0; r < rows; ++r) {
              if (c.first + key < c.seen[r])
                visit(panel * kPanelRows + r, c.first + key, c.scores[key * kPanelRows + r]);
            }
          }
        });
      }
    };
    RadixThreshold crossing{false, 0, 0, 0};
    if (policy_.gamma < 1) {
      crossing = FindRadixThreshold(double{policy_.gamma} * static_cast<double>(n),
                                    [&](const auto& visit) { for_map([&](int64_t, int64_t, float x) { visit(x); }); });
    }
    // Equal ones go by row, then by block. They are rare, and a row's own come by block.
    int32_t* left = t_.query_left;
    std::fill_n(left, n, 0);
    if (crossing.crosses && crossing.equal > 0) {
      for_map([&](int64_t r, int64_t, float x) { left[r] += x == crossing.value; });
      int64_t remaining = crossing.equal;
      for (int64_t r = 0; r < n; ++r) {
        left[r] = static_cast<int32_t>(std::min<int64_t>(left[r], remaining));
        remaining -= left[r];
      }
    }
    for_map([&](int64_t r, int64_t block, float x) {
      const bool kept = !crossing.crosses || x > crossing.value || (x == crossing.value && left[r]-- > 0);
      if (!kept) return;
      const int64_t last = std::min((r + 1) * Size(), call_.s.q_len) - 1;
      for (int64_t m = r * Size() / call_.g.tile_tokens; m <= last / call_.g.tile_tokens; ++m)
        SetBit(call_.Row(m), block);
    });
  }

  const HeadCall& call_;
  const fp_flexprefill& policy_;
  const VerticalSlashScratch& t_;
};

} // namespace

void ChooseFlexPrefill(const HeadCall& call) { FlexPrefill(call).Choose(); }

} // namespace flashprefill::cpu
