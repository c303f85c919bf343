// cpu/vertical_slash/radix_threshold.h against a sort: ties, zeros, limits that nothing passes.
#include "cpu/vertical_slash/radix_threshold.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <vector>

namespace flashprefill::cpu {
namespace {

RadixThreshold Find(double limit, const std::vector<float>& values) {
  return FindRadixThreshold(limit, [&](const auto& visit) {
    for (float x : values) visit(x);
  });
}

// How many of the largest values sum to at most the limit. Values are small integers times a power of two here, so that
// every sum is exact.
int64_t Expected(double limit, std::vector<float> values) {
  std::sort(values.begin(), values.end(), std::greater<>());
  double sum = 0;
  int64_t count = 0;
  while (count < static_cast<int64_t>(values.size()) && sum + values[count] <= limit) sum += values[count++];
  return count;
}

TEST(RadixThreshold, TakesTheLargestUpToTheLimit) {
  const RadixThreshold t = Find(7, {1, 4, 2, 3});
  EXPECT_TRUE(t.crosses);
  EXPECT_EQ(t.value, 2);
  EXPECT_EQ(t.above, 2);
  EXPECT_EQ(t.equal, 0);
}

TEST(RadixThreshold, CountsEqualOnesThatFit) {
  const RadixThreshold t = Find(7, {3, 2, 2, 2, 1});
  EXPECT_EQ(t.value, 2);
  EXPECT_EQ(t.above, 1);
  EXPECT_EQ(t.equal, 2);
  EXPECT_EQ(t.count(), 3);
}

TEST(RadixThreshold, WithoutACrossingAllAreIn) {
  EXPECT_FALSE(Find(10, {1, 4, 2, 3}).crosses);
  EXPECT_EQ(Find(10, {1, 4, 2, 3}).above, 4);
  EXPECT_FALSE(Find(0, {}).crosses);
  EXPECT_FALSE(Find(0, {0, 0, 0}).crosses); // zeros never pass a limit
  EXPECT_EQ(Find(0, {0, 0, 0}).above, 3);
}

TEST(RadixThreshold, ALimitBelowTheLargestLeavesAllOut) {
  const RadixThreshold t = Find(3.5, {4, 1, 1});
  EXPECT_TRUE(t.crosses);
  EXPECT_EQ(t.value, 4);
  EXPECT_EQ(t.count(), 0);
}

TEST(RadixThreshold, NanCrossesAndEnds) {
  const RadixThreshold t = Find(3, {1, NAN, 1});
  EXPECT_TRUE(t.crosses);
  EXPECT_EQ(t.count(), 0);
}

TEST(RadixThreshold, AgreesWithASort) {
  std::mt19937 random(3);
  for (int trial = 0; trial < 300; ++trial) {
    std::vector<float> values(random() % 200);
    const float scale = std::ldexp(1.f, -static_cast<int>(random() % 30));
    const uint32_t range = trial % 3 == 0 ? 4 : 1u << 14; // many ties, or few
    for (float& x : values) x = static_cast<float>(random() % range) * scale;
    double total = 0;
    for (float x : values) total += x;
    const double limit = total * (random() % 17) / 16;
    const RadixThreshold t = Find(limit, values);
    const int64_t expected = Expected(limit, values);
    ASSERT_EQ(t.crosses ? t.count() : t.above, expected);
    ASSERT_EQ(t.crosses, expected < static_cast<int64_t>(values.size()));
    if (t.crosses) {
      ASSERT_EQ(t.above, std::count_if(values.begin(), values.end(), [&](float x) { return x > t.value; }));
    }
  }
}

} // namespace
} // namespace flashprefill::cpu
