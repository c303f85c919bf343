// cpu/top_p.h on small arrays, against a sort: ties, zeros, what is not ranked.
#include "cpu/top_p.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "core/types.h"

namespace flashprefill::cpu {
namespace {

// The blocks whose bits `choose(keys, row)` sets.
template <typename Choose>
std::vector<int64_t> Kept(int64_t n, const Choose& choose, const std::vector<int64_t>& before = {}) {
  std::vector<uint64_t> keys(n + 1), row(DivUp<int64_t>(n, 64) + 1);
  for (int64_t b : before) SetBit(row.data(), b);
  choose(keys.data(), row.data());
  std::vector<int64_t> kept;
  for (int64_t b = 0; b < n; ++b) {
    if (TestBit(row.data(), b)) kept.push_back(b);
  }
  return kept;
}

std::vector<int64_t> KeptTopP(const std::vector<float>& mass, float share, const std::vector<int64_t>& before = {}) {
  const auto n = static_cast<int64_t>(mass.size());
  return Kept(
      n, [&](uint64_t* keys, uint64_t* row) { TopP(mass.data(), n, share, keys, row); }, before);
}

std::vector<int64_t> KeptTopK(const std::vector<float>& energies, int64_t count) {
  const auto n = static_cast<int64_t>(energies.size());
  return Kept(n, [&](uint64_t* keys, uint64_t* row) { TopK(energies.data(), n, count, keys, row); });
}

std::vector<int64_t> KeptTopPExclusive(const std::vector<float>& energies, float share) {
  const auto n = static_cast<int64_t>(energies.size());
  return Kept(n, [&](uint64_t* keys, uint64_t* row) { TopPExclusive(energies.data(), n, share, keys, row); });
}

std::vector<int64_t> KeptByEnergy(const KeepRule& rule, const std::vector<float>& energies) {
  const auto n = static_cast<int64_t>(energies.size());
  const float largest = n == 0 ? 0 : *std::max_element(energies.begin(), energies.end());
  return Kept(n, [&](uint64_t* keys, uint64_t* row) { KeepByEnergy(rule, energies.data(), n, largest, keys, row); });
}

using Blocks = std::vector<int64_t>;

// Masses that sum to 8, so that shares in eighths are exact.
const std::vector<float> kMass = {0.5f, 4, 1.5f, 2};

TEST(TopP, TheBlockThatCrossesIsKept) {
  EXPECT_EQ(KeptTopP(kMass, 0.5f), Blocks({1}));
  EXPECT_EQ(KeptTopP(kMass, 0.51f), Blocks({1, 3}));
  EXPECT_EQ(KeptTopP(kMass, 0.75f), Blocks({1, 3}));
  EXPECT_EQ(KeptTopP(kMass, 0.76f), Blocks({1, 2, 3}));
  EXPECT_EQ(KeptTopP(kMass, 1), Blocks({0, 1, 2, 3}));
  EXPECT_EQ(KeptTopP(kMass, 0), Blocks());
}

TEST(TopP, BlocksThatAreSetCountFirst) {
  EXPECT_EQ(KeptTopP(kMass, 0.25f, {3}), Blocks({3}));
  EXPECT_EQ(KeptTopP(kMass, 0.26f, {3}), Blocks({1, 3}));
  EXPECT_EQ(KeptTopP(kMass, 0.5f, {0, 2}), Blocks({0, 1, 2}));
}

TEST(TopP, EqualOnesGoByIndexAndZerosAddNothing) {
  EXPECT_EQ(KeptTopP({1, 1, 1, 1}, 0.5f), Blocks({0, 1}));
  EXPECT_EQ(KeptTopP({0, 0, 0}, 0.9f), Blocks());
  EXPECT_EQ(KeptTopP({0, 2, 0, 2}, 0.99f), Blocks({1, 3}));
  EXPECT_EQ(KeptTopP({}, 0.5f), Blocks());
}

// Masses of 0 may be underflows, and a share of 1 is a wish for everything.
TEST(TopP, AShareOfOneIsEverything) { EXPECT_EQ(KeptTopP({0, 2, 0, 2}, 1), Blocks({0, 1, 2, 3})); }

TEST(TopK, EqualOnesGoByIndex) {
  EXPECT_EQ(KeptTopK({1, 3, 3, 2}, 1), Blocks({1}));
  EXPECT_EQ(KeptTopK({1, 3, 3, 2}, 3), Blocks({1, 2, 3}));
  EXPECT_EQ(KeptTopK({0, 0}, 1), Blocks({0}));
  EXPECT_EQ(KeptTopK({1, 2}, 0), Blocks());
  EXPECT_EQ(KeptTopK({1, 2}, 5), Blocks({0, 1}));
}

TEST(TopK, UnrankedOnesAndNanAreLeftOut) {
  EXPECT_EQ(KeptTopK({kUnranked, 1, NAN, 0}, 4), Blocks({1, 3}));
  EXPECT_EQ(KeptTopPExclusive({kUnranked, 1, NAN, 3}, 1), Blocks({1, 3}));
  EXPECT_EQ(KeptTopPExclusive({kUnranked, kUnranked}, 1), Blocks());
}

TEST(TopPExclusive, TheBlockThatCrossesIsLeftOutUnlessItIsTheFirst) {
  EXPECT_EQ(KeptTopPExclusive(kMass, 0.1f), Blocks({1}));
  EXPECT_EQ(KeptTopPExclusive(kMass, 0.74f), Blocks({1}));
  EXPECT_EQ(KeptTopPExclusive(kMass, 0.75f), Blocks({1, 3}));
  EXPECT_EQ(KeptTopPExclusive({2, 2, 2, 2}, 0.5f), Blocks({0, 1}));
  EXPECT_EQ(KeptTopPExclusive({0, 0, 0}, 0.5f), Blocks({0, 1, 2})); // no sum passes a share of nothing
}

TEST(KeepByEnergy, AlphaIsRelativeToTheLargest) {
  EXPECT_EQ(KeptByEnergy({.alpha = 0.5f}, {1, 4, 2, 1.9f}), Blocks({1, 2}));
  EXPECT_EQ(KeptByEnergy({.alpha = 0}, {0, 4, 0}), Blocks({0, 1, 2}));
  EXPECT_EQ(KeptByEnergy({.alpha = 2}, {1, 4}), Blocks());
  EXPECT_EQ(KeptByEnergy({.alpha = 2, .min_blocks = 2}, {3, 4, 3}), Blocks({0, 1}));
  EXPECT_EQ(KeptByEnergy({.alpha = 2, .min_blocks = 9}, {3, 4}), Blocks({0, 1}));
}

TEST(KeepByEnergy, AlphaWorksInEveryWordOfARow) {
  std::vector<float> energies(150);
  for (size_t b = 0; b < energies.size(); ++b) energies[b] = b % 3 == 0 ? 1.f : 0.1f;
  Blocks expected;
  for (int64_t b = 0; b < 150; b += 3) expected.push_back(b);
  EXPECT_EQ(KeptByEnergy({.alpha = 0.5f}, energies), expected);
}

TEST(KeepByEnergy, MassAndGainTakeTheLargestFirst) {
  EXPECT_EQ(KeptByEnergy({.mass = 0.5f}, kMass), Blocks({1}));
  EXPECT_EQ(KeptByEnergy({.mass = 0.76f}, kMass), Blocks({1, 2, 3}));
  EXPECT_EQ(KeptByEnergy({.mass = 0.1f, .min_blocks = 2}, kMass), Blocks({1, 3}));
  EXPECT_EQ(KeptByEnergy({.mass = 1}, {0, 1, 0}), Blocks({1}));
  // 0.4 sqrt(1) and 0.3 sqrt(0.6) = 0.23 are worth it, 0.2 sqrt(0.3) = 0.11 is not.
  EXPECT_EQ(KeptByEnergy({.gain = 0.2f}, {1, 4, 2, 3}), Blocks({1, 3}));
  EXPECT_EQ(KeptByEnergy({.gain = 0.9f, .min_blocks = 1}, {1, 4, 2, 3}), Blocks({1}));
}

// Against the plain statement, over many small arrays with ties and zeros.
TEST(TopP, IsTheSmallestSetOfTheLargest) {
  std::mt19937 random(7);
  for (int trial = 0; trial < 500; ++trial) {
    const auto n = static_cast<int64_t>(random() % 90);
    std::vector<float> mass(n);
    for (float& x : mass) x = static_cast<float>(random() % 5);
    const float share = static_cast<float>(random() % 9) / 8;
    Blocks order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return mass[a] > mass[b]; });
    const double total = std::accumulate(mass.begin(), mass.end(), 0.0);
    Blocks expected;
    double sum = 0;
    for (int64_t i = 0; i < n && (share == 1 || sum < share * total); ++i) {
      expected.push_back(order[i]);
      sum += mass[order[i]];
    }
    std::sort(expected.begin(), expected.end());
    ASSERT_EQ(KeptTopP(mass, share), expected);
    const int64_t count = random() % (n + 1);
    Blocks top(order.begin(), order.begin() + count);
    std::sort(top.begin(), top.end());
    ASSERT_EQ(KeptTopK(mass, count), top);
  }
}

} // namespace
} // namespace flashprefill::cpu
