// See pooled_map.h. The map is computed again in each pass over it: denominators, three digits of the threshold, bits.
#include "cpu/vertical_slash/pooled_map.h"

#include <cmath>
#include <limits>

#include "cpu/vertical_slash/radix_threshold.h"

namespace flashprefill::cpu {
namespace {

class PooledMap {
 public:
  explicit PooledMap(const HeadCall& call) : call_(call), t_(call.scratch), rows_(call.query_blocks()) {}

  int64_t rows() const { return rows_; }

  // Finds the denominators. To be called first.
  void Normalise() const {
    PoolQueries(call_);
    for (int64_t panel = 0; panel < Panels(); ++panel) {
      std::fill_n(t_.largest, kPanelRows, kLeastScore);
      std::fill_n(t_.sums, kPanelRows, 0.f);
      ForPooledScores(call_, panel, [&](const ScoreChunk& c) { call_.kernels.add_to_sums(c, t_.largest, t_.sums); });
      for (int lane = 0; lane < kPanelRows; ++lane) {
        t_.query_reference[panel * kPanelRows + lane] =
            t_.sums[lane] > 0 ? t_.largest[lane] + std::log2(t_.sums[lane]) : std::numeric_limits<float>::infinity();
      }
    }
  }

  // visit(row, key block, entry) for all entries.
  template <typename Visit>
  void ForEntries(const Visit& visit) const {
    for (int64_t panel = 0; panel < Panels(); ++panel) {
      const int64_t rows = std::min<int64_t>(kPanelRows, rows_ - panel * kPanelRows);
      ForPooledScores(call_, panel, [&](const ScoreChunk& c) {
        call_.kernels.share(c, t_.query_reference + panel * kPanelRows);
        for (int64_t key = 0; key < c.count; ++key) {
          for (int64_t r = 0; r < rows; ++r) {
            if (c.first + key < c.seen[r]) visit(panel * kPanelRows + r, c.first + key, c.scores[key * kPanelRows + r]);
          }
        }
      });
    }
  }

 private:
  int64_t Panels() const { return DivUp<int64_t>(rows_, kPanelRows); }

  const HeadCall& call_;
  const VerticalSlashScratch& t_;
  const int64_t rows_;
};

} // namespace

void KeepByPooledMap(const HeadCall& call, float share) {
  const PooledMap map(call);
  map.Normalise();
  RadixThreshold threshold{false, 0, 0, 0};
  if (share < 1) {
    threshold = FindRadixThreshold(double{share} * static_cast<double>(map.rows()), [&](const auto& visit) {
      map.ForEntries([&](int64_t, int64_t, float x) { visit(x); });
    });
  }
  // How many of a row's entries that equal the threshold are kept. There are few such rows, and a row's own entries
  // come by block.
  int32_t* left = call.scratch.query_left;
  std::fill_n(left, map.rows(), 0);
  if (threshold.crosses && threshold.equal > 0) {
    map.ForEntries([&](int64_t r, int64_t, float x) { left[r] += x == threshold.value; });
    int64_t remaining = threshold.equal;
    for (int64_t r = 0; r < map.rows(); ++r) {
      left[r] = static_cast<int32_t>(std::min<int64_t>(left[r], remaining));
      remaining -= left[r];
    }
  }
  map.ForEntries([&](int64_t r, int64_t block, float x) {
    const bool kept = !threshold.crosses || x > threshold.value || (x == threshold.value && left[r]-- > 0);
    if (!kept) return;
    const int64_t last = std::min((r + 1) * call.block_size(), call.s.q_len) - 1;
    for (int64_t m = r * call.block_size() / call.g.tile_tokens; m <= last / call.g.tile_tokens; ++m) {
      SetBit(call.Row(m), block);
    }
  });
}

} // namespace flashprefill::cpu
