// VSPrefill (arXiv 2603.04460): what an indexer predicts of a KV head from its keys and values.
//
//   logits of token j: vertical . z and slash . z, with z = SiLU(up [k_j | v_j] + bias)
//   verticals: softmax of the first over the sequence's tokens; the fewest tokens with vertical_mass of it are kept
//   slashes: softmax of the second; that of token j is of the distance j. The fewest with slash_mass of it are kept
//
// The largest come first, equal ones by index. A logit that is not finite is never chosen. The query heads of a KV head
// keep the same. Verticals and slashes are rounded out to the blocks that hold some of them, or stay tokens.
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "reference/selector.h"
#include "reference/vertical_slash.h"

namespace flashprefill::methods::vsprefill {
namespace {

using namespace reference;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

class VSPrefill : public HeadSelector {
 public:
  explicit VSPrefill(const HeadView& head)
      : head_(head), policy_(reinterpret_cast<const fp_vsprefill&>(head.policy)), columns_(Tokens()), lines_(Tokens()) {
    if (policy_.hidden == 0) return;
    const int64_t kv_head = head.first_head / head.geometry.group;
    const Matrix values = LoadValues(head.problem, head.sequence, kv_head);
    std::vector<double> vertical(Tokens()), slash(Tokens());
    for (size_t t = 0; t < Tokens(); ++t) {
      const int64_t token = static_cast<int64_t>(t);
      Logits(kv_head, head.keys[token], values[token], vertical[t], slash[t]);
    }
    columns_ = Fewest(vertical, policy_.vertical_mass);
    lines_ = Fewest(slash, policy_.slash_mass);
  }

  TileChoice Choose(const Tile& tile) const override {
    TileChoice choice;
    choice.energy.resize(static_cast<size_t>(tile.visible));
    choice.scored.assign(static_cast<size_t>(tile.visible), 1);
    choice.kept.resize(static_cast<size_t>(tile.visible));
    choice.near_tie.resize(static_cast<size_t>(tile.visible));
    for (int64_t b = 0; policy_.rounding == FP_ROUND_BLOCKS && b < tile.visible; ++b) {
      choice.kept[b] = Keeps(&Chosen::kept, tile, b);
      choice.near_tie[b] = Keeps(&Chosen::most, tile, b) && !Keeps(&Chosen::least, tile, b);
    }
    return choice;
  }

  void ChooseVerticalSlash(std::vector<int32_t>& columns, std::vector<int32_t>& distances) const override {
    for (size_t t = 0; t < Tokens(); ++t) {
      if (columns_.kept[t]) columns.push_back(static_cast<int32_t>(t));
      if (lines_.kept[t]) distances.push_back(static_cast<int32_t>(t));
    }
  }

 private:
  size_t Tokens() const { return static_cast<size_t>(head_.sequence.k_len); }

  void Logits(int64_t kv_head, const double* key, const double* value, double& vertical, double& slash) const {
    const int64_t d = head_.problem.head_dim;
    vertical = slash = 0;
    for (int64_t u = kv_head * policy_.hidden; u < (kv_head + 1) * policy_.hidden; ++u) {
      const float* up = policy_.up + u * 2 * d;
      double z = policy_.bias[u];
      for (int64_t i = 0; i < d; ++i) z += up[i] * key[i] + up[d + i] * value[i];
      const double unit = z / (1 + std::exp(-z));
      vertical += policy_.vertical[u] * unit;
      slash += policy_.slash[u] * unit;
    }
  }

  // The fewest tokens with the mass p of the softmax of some logits.
  Chosen Fewest(std::vector<double>& logits, double p) const {
    for (double& z : logits) z = std::isfinite(z) ? z : -kInfinity;
    const double largest = *std::max_element(logits.begin(), logits.end());
    if (largest == -kInfinity) return Chosen(logits.size());
    std::vector<double> share = logits, falling;
    for (double& x : share) x = x == -kInfinity ? x : std::exp(x - largest);
    for (const double x : share) {
      if (x > -kInfinity) falling.push_back(x);
    }
    std::sort(falling.begin(), falling.end(), std::greater<>());
    const double total = std::accumulate(falling.begin(), falling.end(), 0.0);
    const auto count = [&](double mass) {
      double sum = 0;
      int64_t n = 0;
      for (; n < static_cast<int64_t>(falling.size()) && (n == 0 || sum < mass * total); ++n) sum += falling[n];
      return n;
    };
    const double tolerance = ScoreTolerance(head_.problem);
    return Largest(share, {count(p), count(p - tolerance), count(p + tolerance)}, tolerance);
  }

  // Whether a vertical lies in the block, or a slash crosses it inside the tile.
  bool Keeps(std::vector<uint8_t> Chosen::*level, const Tile& tile, int64_t block) const {
    const int64_t begin = block * head_.geometry.block_size;
    const int64_t end = begin + head_.geometry.BlockKeys(head_.sequence, block);
    for (int64_t t = begin; t < end; ++t) {
      if ((columns_.*level)[t]) return true;
    }
    const int64_t first = head_.sequence.prefix + tile.begin, last = head_.sequence.prefix + tile.end - 1;
    for (int64_t d = std::max<int64_t>(0, first - (end - 1)); d <= last - begin; ++d) {
      if ((lines_.*level)[d]) return true;
    }
    return false;
  }

  HeadView head_;
  const fp_vsprefill& policy_;
  Chosen columns_, lines_;
};

} // namespace

extern const reference::Selector kReference = {Make<VSPrefill>};

} // namespace flashprefill::methods::vsprefill
