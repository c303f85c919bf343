// Helpers of tests that work a case out by hand: inputs of one dimension, softmax_scale 1 and queries of 1, so that a
// key of ln(w) has the weight w.
#ifndef FLASHPREFILL_TESTS_BY_HAND_H_
#define FLASHPREFILL_TESTS_BY_HAND_H_

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>
#include <vector>

#include "engine.h"
#include "reference/reference.h"

namespace flashprefill::test {

using reference::TileChoice;

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

inline std::set<int64_t> Kept(const Mask& mask, int64_t row) {
  std::set<int64_t> kept;
  for (int64_t b = 0; b < mask.view.words * 64; ++b) {
    if (TestBit(mask.Row(row), b)) kept.insert(b);
  }
  return kept;
}

using Blocks = std::set<int64_t>;

// Every backend keeps these blocks, and no others, in this row of the mask.
inline void ExpectKept(const OpData& data, const AnyPolicy& policy, int64_t row, const Blocks& blocks) {
  for (const Engine& engine : AllEngines()) {
    EXPECT_EQ(Kept(Select(engine, data.problem(), policy), row), blocks) << engine.Name() << ", " << Name(policy);
  }
}

// The same for tiles 0, 1, .. of the first mask head.
inline void ExpectTiles(const OpData& data, const AnyPolicy& policy, const std::vector<Blocks>& tiles) {
  for (size_t m = 0; m < tiles.size(); ++m) ExpectKept(data, policy, static_cast<int64_t>(m), tiles[m]);
}

// The reference's scores in tile m of a mask head.
inline TileChoice ChoiceOf(const OpData& data, const AnyPolicy& policy, int64_t m, int64_t mask_head = 0) {
  std::map<int64_t, TileChoice> choices;
  Mask mask(data.problem(), policy.get());
  reference::Select(data.problem(), *policy.get(), mask.view,
                    [&](const Sequence&, int64_t head, int64_t tile, const TileChoice& choice) {
                      if (head == mask_head) choices[tile] = choice;
                    });
  return choices.at(m);
}

// Energies divided by the energy of block `unit`.
inline std::vector<double> Relative(const TileChoice& choice, int64_t unit) {
  std::vector<double> energies = choice.energy;
  const double one = energies.at(unit);
  for (double& e : energies) e /= one;
  return energies;
}

inline void ExpectNear(const std::vector<double>& expected, const std::vector<double>& actual,
                       double tolerance = 1e-6) {
  ASSERT_EQ(expected.size(), actual.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(actual[i], expected[i], tolerance * std::max(1.0, std::abs(expected[i]))) << "block " << i;
  }
}

} // namespace flashprefill::test

#endif // FLASHPREFILL_TESTS_BY_HAND_H_
