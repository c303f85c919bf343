// Inputs whose masks can be worked out on paper. They have one dimension, softmax_scale 1 and queries of 1, so that a
// key of ln(w) weighs w.
#ifndef FLASHPREFILL_TESTS_BY_HAND_H_
#define FLASHPREFILL_TESTS_BY_HAND_H_

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

#include "engine.h"

namespace flashprefill::test {

inline OpCase OneDimension(Lengths lengths, int group = 1) {
  OpCase op;
  op.lengths = {lengths};
  op.head_dim = 1;
  op.group = group;
  op.softmax_scale = 1;
  return op;
}

// All queries 1; the keys of block b are ln(weights[b]).
inline void SetWeights(OpData& data, int block_size, const std::vector<double>& weights) {
  const Sequence s = data.sequence(0);
  for (int64_t i = 0; i < s.q_len; ++i) {
    for (int h = 0; h < data.problem().q_heads; ++h) data.SetQuery(s, i, h, 0, 1);
  }
  for (int64_t t = 0; t < s.k_len; ++t) {
    data.SetKey(data.problem().k, s, t, 0, 0, static_cast<float>(std::log(weights.at(t / block_size))));
  }
}

using Blocks = std::set<int64_t>;

inline Blocks Kept(const Mask& mask, int64_t row) {
  Blocks kept;
  for (int64_t b = 0; b < mask.view.words * 64; ++b) {
    if (TestBit(mask.Row(row), b)) kept.insert(b);
  }
  return kept;
}

// Every backend keeps these blocks, and no others, in this row of the mask.
inline void ExpectKept(const OpData& data, const AnyPolicy& policy, int64_t row, const Blocks& blocks) {
  for (const Engine& engine : AllEngines()) {
    EXPECT_EQ(Kept(Select(engine, data.problem(), policy), row), blocks)
        << engine.Name() << ", row " << row << ", " << Name(policy);
  }
}

} // namespace flashprefill::test

#endif // FLASHPREFILL_TESTS_BY_HAND_H_
