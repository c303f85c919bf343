// What one call of select works with: the policy's numbers in one flat form for all scoring policies, and the shapes of
// what is kept between its two phases.
//
// A key block is described by up to 17 *terms*, and scoring a block means a product of a query row with each of them,
// plus the term's bias, in exponents of two:
//
//     energy(row, block) = sum over terms of 2^(bias + row . values)
//
// FlashPrefill has one term, the mean key. Sketch's first term is the mean and the variance of the keys without the
// outliers, one below the other: query rows are (c q, c^2 ln2 / 2 q^2) there, with c = softmax_scale log2(e), so its
// second-order term costs a product twice as deep and nothing else. Every outlier is a term more.
//
// Terms lie in *panels* of 32 neighbouring blocks: for each term 32 biases, then its values as [depth][32], which is
// what the product's inner loop reads, front to back. A panel of d128 is 16 KiB: it stays in L1 while the rows of all
// heads of a group pass over it.
#ifndef FLASHPREFILL_CPU_SELECT_PLAN_H_
#define FLASHPREFILL_CPU_SELECT_PLAN_H_

#include <cmath>
#include <cstdint>

#include "core/types.h"

namespace flashprefill::cpu {

constexpr int kPanelBlocks = 32;

struct SelectPlan {
  Geometry g;
  bool scores; // false: Dense and Streaming, which look at no key
  bool sketch;
  bool shared; // one list for all heads of a group
  float alpha; // or NaN, where mass or gain decides
  float mass;  // or NaN, where gain does
  float gain;
  bool query_metric;
  int outliers;
  int query_pool;
  int min_blocks;

  int terms;            // 1 + outliers
  int depth;            // of the first term and of query rows: head_dim, or twice that for Sketch
  int64_t panel_floats; // of one panel of one KV head
  int heads_per_item;   // query heads that one work item scores
  int max_rows;         // rows that it scores at most
  float exponent_scale; // softmax_scale * log2(e): scores become exponents of two

  static SelectPlan Of(const Problem& p, const Policy& policy) {
    SelectPlan plan{};
    plan.g = Geometry::Of(p, policy);
    plan.sketch = policy.kind == FP_SKETCH;
    plan.scores = plan.sketch || policy.kind == FP_FLASHPREFILL;
    plan.shared = policy.share_heads != 0;
    plan.query_pool = 1;
    if (plan.sketch) {
      const auto& s = reinterpret_cast<const fp_sketch&>(policy);
      plan.alpha = s.alpha, plan.mass = s.mass, plan.gain = s.gain;
      plan.query_metric = s.query_metric != 0, plan.outliers = s.outliers;
      plan.query_pool = s.query_pool, plan.min_blocks = s.min_blocks;
    } else if (plan.scores) {
      const auto& f = reinterpret_cast<const fp_flashprefill&>(policy);
      plan.alpha = f.alpha, plan.mass = plan.gain = NAN;
      plan.query_pool = f.query_pool, plan.min_blocks = f.min_blocks;
    }
    plan.terms = 1 + plan.outliers;
    plan.depth = plan.sketch ? 2 * p.head_dim : p.head_dim;
    plan.panel_floats = int64_t{kPanelBlocks} * (plan.terms + plan.depth + int64_t{plan.outliers} * p.head_dim);
    plan.exponent_scale = static_cast<float>(p.softmax_scale * 1.4426950408889634);
    // All heads of a group in one item read longer runs of Q and share panels in L1, as long as their rows fit into a
    // part of L2 beside the panels.
    const int64_t head_rows = plan.RowsPerHead(plan.g.tile_tokens);
    const int64_t fitting = (128 << 10) / (head_rows * plan.depth * static_cast<int64_t>(sizeof(float)));
    plan.heads_per_item = plan.shared ? plan.g.group : static_cast<int>(std::clamp<int64_t>(fitting, 1, plan.g.group));
    plan.max_rows = static_cast<int>(plan.heads_per_item * head_rows);
    return plan;
  }

  // Rows that are scored for one head of a tile of so many tokens.
  int RowsPerHead(int64_t tokens) const { return static_cast<int>(DivUp<int64_t>(tokens, query_pool)); }
  int64_t Panels(const Sequence& s) const { return DivUp<int64_t>(g.Blocks(s), kPanelBlocks); }
  int Splits() const { return DivUp(g.group, heads_per_item); } // work items a (KV head, tile)

  // Blocks [0, n) are what a row at this position scores: those it sees whole, or with shared heads those it sees the
  // first token of, if they end at or before the tile's last token.
  int64_t Visible(const Sequence& s, const Tile& tile, int64_t token) const {
    const int64_t at = s.prefix + token;
    if (!shared) return (at + 1) / g.block_size;
    return std::min(at / g.block_size + 1, (s.prefix + tile.end) / g.block_size);
  }
};

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_SELECT_PLAN_H_
