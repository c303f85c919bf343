// S2O: the policies that are compared with the reference, and lists worked out by hand. See by_hand.h for what inputs
// are.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "by_hand.h"
#include "core/key_list.h"
#include "method_suite.h"

namespace flashprefill::test {
namespace {

AnyPolicy S2O(int block_size, const std::string& fields) { return Parse("s2o(" + fields + ")", block_size); }

std::vector<AnyPolicy> Policies(int block_size, int) {
  return {S2O(block_size, "tau=0.3, segment=128"), Shared(S2O(block_size, "tau=0.2, segment=256, stop_rows=5")),
          WithForced(S2O(block_size, "tau=0.1, segment=1, stop_rows=1000"), 1, 2, 1),
          Shared(WithForced(S2O(block_size, "tau=0.5, segment=5000, max_keys=150"), 2, 1, 0))};
}

const RegisterSuite suite({.method = "s2o", .policies = Policies, .scale = 1, .many = 2, .few = 2});

// 128 queries after 512 keys, whose weights are by 128 keys 1, 64, 16 and 4; the segment's own keys weigh 64.
OpData FourGroups(int group = 1) {
  OpData data(OneDimension({128, 640}, group));
  SetWeights(data, 128, {1, 64, 16, 4, 64});
  return data;
}

using Keys = std::vector<int32_t>;

Keys Range(int32_t begin, int32_t end) {
  Keys keys(static_cast<size_t>(end - begin));
  std::iota(keys.begin(), keys.end(), begin);
  return keys;
}

void ExpectList(const OpData& data, const AnyPolicy& policy, const Keys& keys, int64_t wanted, int64_t head = 0) {
  for (const Engine& engine : AllEngines()) {
    const Mask mask = Select(engine, data.problem(), policy);
    EXPECT_EQ(mask.Keys(data.sequence(0), head, 0), keys) << engine.Name() << ", " << Name(policy);
    EXPECT_EQ(KeyList::Of(mask.view, data.sequence(0), head, 0).wanted, wanted) << engine.Name() << Name(policy);
  }
}

TEST(S2OByHand, StopsWhereTwoGroupsAddLittle) {
  const OpData data = FourGroups();
  // With one row it is the last, which has its own 128 keys: 8192. In order the groups add 8192, 2048, 512 and 128:
  //     8192 / 8192 = 1    2048 / 16384 = 0.125    512 / 18432 = 0.0278    128 / 18944 = 0.00676
  // Both groups that stop it are kept.
  ExpectList(data, S2O(64, "tau=0.2, stop_rows=1"), Range(128, 512), 384);
  ExpectList(data, S2O(64, "tau=0.13, stop_rows=1"), Range(128, 512), 384);
  ExpectList(data, S2O(64, "tau=0.12, stop_rows=1"), Range(0, 512), 512);
  ExpectList(data, S2O(64, "tau=0.006, stop_rows=1"), Range(0, 512), 512);
  // Two rows are 63 and 127. The first has 4096 at first: 2 and 1, then 2048 / 12288 = 0.167 and 0.125, 0.146 on
  // average; 0.0357 and 0.0278.
  ExpectList(data, S2O(64, "tau=0.15, stop_rows=2"), Range(128, 512), 384);
  ExpectList(data, S2O(64, "tau=0.14, stop_rows=2"), Range(0, 512), 512);
  // Blocks are the segment's own.
  ExpectKept(data, S2O(64, "tau=0.2"), 0, {8, 9});
}

TEST(S2OByHand, TheSinkIsABlockAndCounts) {
  const OpData data = FourGroups();
  // The first 128 keys are kept as blocks, so rows begin with 8320: the groups add 8192 / 8320 = 0.98, 2048 / 16512 =
  // 0.124 and 512 / 18560 = 0.0276.
  ExpectList(data, WithForced(S2O(64, "tau=0.1245, stop_rows=1"), 2, 1, 0), Range(128, 512), 384);
  ExpectList(data, WithForced(S2O(64, "tau=0.99, stop_rows=1"), 2, 1, 0), Range(128, 384), 256);
  ExpectKept(data, WithForced(S2O(64, "tau=0.2"), 2, 1, 0), 0, {0, 1, 8, 9});
}

TEST(S2OByHand, AFullListHoldsTheBest) {
  const OpData data = FourGroups();
  ExpectList(data, S2O(64, "tau=0.05, stop_rows=1, max_keys=256"), Range(128, 384), 257); // one more at least
  ExpectList(data, S2O(64, "tau=0.2, stop_rows=1, max_keys=384"), Range(128, 512), 384);  // it stops in time
}

TEST(S2OByHand, AnOrderPerQueryHeadOrPerKvHead) {
  OpData data = FourGroups(2);
  const Sequence s = data.sequence(0);
  for (int64_t i = 0; i < 128; ++i) data.SetQuery(s, i, 1, 0, 0); // the second head sees all keys alike
  // Its keys come by their indices, and add 128 to 128, 256, 384, 512: 1, 0.5, 0.33, 0.25.
  ExpectList(data, S2O(64, "tau=0.6, stop_rows=1"), Range(0, 384), 384, 1);
  ExpectList(data, S2O(64, "tau=0.4, stop_rows=1"), Range(0, 512), 512, 1);
  ExpectList(data, S2O(64, "tau=0.2, stop_rows=1"), Range(128, 512), 384, 0);
  // Shared, the order is the first head's, since the second has none, and a ratio is the mean of both: 1 and 1, then
  // 0.125 and 0.5 (0.31), 0.0278 and 0.33 (0.18).
  ExpectList(data, Shared(S2O(64, "tau=0.32, stop_rows=1")), Range(128, 512), 384);
  ExpectList(data, Shared(S2O(64, "tau=0.3, stop_rows=1")), Range(0, 512), 512);
}

TEST(S2O, KeepsAllAtATauOfZero) {
  const OpData data = FourGroups();
  for (const Engine& engine : AllEngines()) {
    const Mask mask = Select(engine, data.problem(), S2O(64, "tau=0"));
    EXPECT_EQ(mask.fallback[0], FP_FALLBACK_DENSE) << engine.Name();
    EXPECT_EQ(Kept(mask, 0).size(), 10u) << engine.Name();
  }
}

} // namespace
} // namespace flashprefill::test
