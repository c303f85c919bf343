// FlexPrefill (arXiv 2502.20766) on the CPU, head by head: see reference.cc for the rules, docs/methods/flexprefill.md
// for why.
#include <cmath>

#include "cpu/vertical_slash/pooled_map.h"
#include "cpu/vertical_slash/radix_threshold.h"
#include "cpu/vertical_slash/vertical_slash.h"

namespace flashprefill::methods::flexprefill {
namespace {

constexpr int64_t kBudgetTokens = 128; // tokens that its authors take for a block's, whatever the block size

class HeadChoice {
 public:
  explicit HeadChoice(const cpu::HeadCall& call)
      : call_(call), policy_(reinterpret_cast<const fp_flexprefill&>(call.policy)), t_(call.scratch) {}

  void Choose() {
    cpu::SumVerticalSlash(call_, Size(), true);
    int64_t verticals = Budget(t_.verticals), slashes = Budget(t_.slashes);
    SumToBlocks();
    const bool query_aware = JensenShannonDistance() < policy_.tau;
    if (query_aware) verticals = slashes = Least();

    const int64_t tiles = call_.g.Tiles(call_.s);
    std::fill_n(t_.vertical_blocks, DivUp<int64_t>(call_.blocks(), 64), uint64_t{0});
    const int64_t kept = cpu::Best(t_.verticals, 1, call_.blocks(), 1, verticals, t_.ranks);
    for (int64_t i = 0; i < kept; ++i) SetBit(t_.vertical_blocks, static_cast<int64_t>(t_.ranks[i]));
    const int64_t kept_slashes = cpu::Best(t_.slashes, 1, call_.blocks(), 1, slashes, t_.ranks);
    for (int64_t m = 0; m < tiles; ++m) {
      uint64_t* row = call_.Row(m);
      std::copy_n(t_.vertical_blocks, DivUp<int64_t>(call_.blocks(), 64), row);
      for (int64_t i = 0; i < kept_slashes; ++i) KeepSlash(m, static_cast<int64_t>(t_.ranks[i]), row);
    }
    if (query_aware) cpu::KeepByPooledMap(call_, policy_.gamma);
  }

 private:
  int64_t Size() const { return call_.block_size(); }
  int64_t Least() const { return std::max<int64_t>(1, DivUp<int64_t>(policy_.min_budget, Size())); }

  // Blocks for the tokens, largest first, that hold gamma of a list of sums.
  int64_t Budget(const float* sums) const {
    const int64_t n = call_.s.k_len, blocks = call_.blocks();
    int64_t tokens = n;
    if (policy_.gamma < 1) {
      const cpu::RadixThreshold crossing = cpu::FindRadixThreshold(policy_.gamma, [&](const auto& visit) {
        for (int64_t i = 0; i < n; ++i) visit(sums[i]);
      });
      tokens = (crossing.crosses ? crossing.count() : n) + 1;
    }
    const int64_t most =
        policy_.max_budget == 0 ? blocks : std::min(blocks, DivUp<int64_t>(policy_.max_budget, Size()));
    return std::min(std::max(tokens / kBudgetTokens + 1, Least()), most);
  }

  // verticals[c] and slashes[d] become those of blocks. A slash's index counts from the far end, so all that the last
  // row finds in one block is one run of it; with both covers, all that is floor(distance / B) away.
  void SumToBlocks() const {
    const int64_t n = call_.s.k_len, blocks = call_.blocks();
    const auto sum = [](const float* from, int64_t count) {
      double total = 0;
      for (int64_t i = 0; i < count; ++i) total += from[i];
      return static_cast<float>(total);
    };
    for (int64_t c = 0; c < blocks; ++c)
      t_.verticals[c] = sum(t_.verticals + c * Size(), call_.g.BlockKeys(call_.s, c));
    const bool from_end = policy_.cover == FP_COVER_BOTH;
    if (from_end) std::reverse(t_.slashes, t_.slashes + n);
    for (int64_t c = 0; c < blocks; ++c) t_.slashes[c] = sum(t_.slashes + c * Size(), call_.g.BlockKeys(call_.s, c));
    if (!from_end) std::reverse(t_.slashes, t_.slashes + blocks);
  }

  double JensenShannonDistance() const {
    const int64_t blocks = call_.blocks(), depth = call_.p.head_dim;
    float* mean = t_.panels;
    cpu::MeanQueries(call_, std::max<int64_t>(0, call_.s.q_len - Size()), call_.s.q_len, mean);
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
      const double a = total > 0 ? std::exp(logit(c) - largest) / total : 0, b = t_.verticals[c], m = (a + b) / 2;
      if (a > 0) sum += a * std::log(a / m) / 2;
      if (b > 0) sum += b * std::log(b / m) / 2;
    }
    return std::sqrt(std::max(sum, 0.0));
  }

  // The blocks of a tile at a distance of blocks from its positions.
  void KeepSlash(int64_t m, int64_t distance, uint64_t* row) const {
    const int64_t begin = call_.s.prefix + m * call_.g.tile_tokens;
    const int64_t end = std::min(begin + call_.g.tile_tokens, call_.s.k_len);
    const int64_t wide = policy_.cover == FP_COVER_BOTH;
    const int64_t last = (end - 1) / Size() - distance;
    for (int64_t b = std::max<int64_t>(0, begin / Size() - distance - wide); b <= last; ++b) SetBit(row, b);
  }

  const cpu::HeadCall& call_;
  const fp_flexprefill& policy_;
  const cpu::VerticalSlashScratch& t_;
};

class Selection : public cpu::HeadSelection {
 public:
  explicit Selection(const cpu::SelectCall& call)
      : HeadSelection(call, {.last_rows = call.g.block_size, .tokens = false, .pooled_logits = false},
                      [](const cpu::HeadCall& head) { HeadChoice(head).Choose(); }) {}
};

} // namespace

extern const cpu::Selector kCpu = cpu::SelectorBy<Selection>();

} // namespace flashprefill::methods::flexprefill
