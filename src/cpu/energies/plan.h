// The shapes of a select by energies: terms of key blocks, rows of queries, and the panels that the terms lie in.
//
// A key block is described by up to 17 *terms*, and scoring a block means a product of a query row with each of them,
// plus the term's bias, in exponents of two:
//
//     energy(row, block) = sum over terms of 2^(bias + row . values)
//
// FlashPrefill has one term, the mean key. Sketch's first term is the mean and the variance of the keys without the
// outliers, stacked: query rows are (c q, c^2 ln2 / 2 q^2) there, with c = softmax_scale log2(e), so its
// second-order term costs a product twice as deep and nothing else. Every outlier is one more term.
//
// Terms lie in *panels* of 32 neighbouring blocks: for each term 32 biases, then its values as [depth][32], which is
// what the product's inner loop reads, front to back. A panel of d128 is 16 KiB: it stays in L1 while the rows of all
// heads of a group pass over it.
#ifndef FLASHPREFILL_CPU_ENERGIES_PLAN_H_
#define FLASHPREFILL_CPU_ENERGIES_PLAN_H_

#include <cstdint>

#include "core/types.h"
#include "cpu/frame.h"

namespace flashprefill::cpu {

// A method's terms and rows.
struct EnergyTerms {
  int query_pool = 1;    // query tokens per row: their mean
  bool variance = false; // the first term is of second order
  int outliers = 0;
};

struct EnergyPlan {
  Geometry g;
  bool shared; // one row of the mask for all heads of a group
  bool variance;
  int outliers;
  int query_pool;

  int terms;            // 1 + outliers
  int depth;            // of the first term and of query rows: head_dim, or twice that with a variance
  int64_t panel_floats; // of one panel of one KV head
  int heads_per_item;   // query heads that one work item scores
  int max_rows;         // rows that it scores at most
  float exponent_scale;

  static EnergyPlan Of(const SelectCall& call, const EnergyTerms& terms) {
    const int64_t d = call.p.head_dim;
    EnergyPlan plan{};
    plan.g = call.g;
    plan.shared = call.policy.share_heads != 0;
    plan.variance = terms.variance, plan.outliers = terms.outliers, plan.query_pool = terms.query_pool;
    plan.terms = 1 + plan.outliers;
    plan.depth = static_cast<int>(plan.variance ? 2 * d : d);
    plan.panel_floats = kPanelBlocks * (plan.terms + plan.depth + plan.outliers * d);
    plan.exponent_scale = ExponentScale(call.p);
    // All heads of a group in one item read longer runs of Q and share panels in L1, as long as their rows fit into a
    // part of L2 along with the panels.
    const int64_t head_rows = plan.RowsPerHead(plan.g.tile_tokens);
    const int64_t fitting = (128 << 10) / (head_rows * plan.depth * static_cast<int64_t>(sizeof(float)));
    plan.heads_per_item = plan.shared ? plan.g.group : static_cast<int>(std::clamp<int64_t>(fitting, 1, plan.g.group));
    plan.max_rows = static_cast<int>(plan.heads_per_item * head_rows);
    return plan;
  }

  // Rows that are scored for one head of a tile.
  int RowsPerHead(int64_t tokens) const { return static_cast<int>(DivUp<int64_t>(tokens, query_pool)); }
  int64_t Panels(const Sequence& s) const { return DivUp<int64_t>(g.Blocks(s), kPanelBlocks); }

  // Blocks [0, n) are what a row at this position scores: those it sees whole, or with shared heads those it sees the
  // first token of, if they end at or before the tile's last token.
  int64_t Visible(const Sequence& s, const Tile& tile, int64_t token) const {
    const int64_t at = s.prefix + token;
    if (!shared) return (at + 1) / g.block_size;
    return std::min(at / g.block_size + 1, (s.prefix + tile.end) / g.block_size);
  }
};

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_ENERGIES_PLAN_H_
