// Bad policies over the C ABI: every field of every method at and beyond its bounds, by the methods' rows, and the
// messages of all kinds of refusals word for word. Nothing is written before a refusal.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "call.h"

namespace flashprefill::test {
namespace {

const double kNan = std::numeric_limits<double>::quiet_NaN();
const double kInf = std::numeric_limits<double>::infinity();

// ---------------------------------------------------------------- every field of every method

std::string Spelled(double value) {
  std::ostringstream text;
  text.precision(12);
  text << value;
  return text.str();
}

// What a message says that a field must be.
std::string RangeOf(const fp_policy_field& f) {
  if (f.type == FP_FIELD_BOOL) return "0 or 1";
  if (f.type != FP_FIELD_FLOAT) return "from " + Spelled(f.least) + " to " + Spelled(f.most);
  const std::string least = (f.flags & FP_FIELD_ABOVE_LEAST ? "above " : "at least ") + Spelled(f.least);
  if (std::isinf(f.most)) return "finite and " + least;
  return least + " and " + (f.flags & FP_FIELD_BELOW_MOST ? "below " : "at most ") + Spelled(f.most);
}

// Values next to the range and far from it.
std::vector<double> Outside(const fp_policy_field& f) {
  if (f.type != FP_FIELD_FLOAT) {
    std::vector<double> values = {f.least - 1, -2147483648.0};
    if (f.most < 2147483647) values.insert(values.end(), {f.most + 1, 2147483647});
    return values;
  }
  const auto least = static_cast<float>(f.least), most = static_cast<float>(f.most);
  std::vector<double> values = {std::nextafter(least, -INFINITY), kInf, -kInf};
  if (f.flags & FP_FIELD_ABOVE_LEAST) values.push_back(least);
  if (std::isfinite(most)) values.push_back(std::nextafter(most, INFINITY));
  if (f.flags & FP_FIELD_BELOW_MOST) values.push_back(most);
  if (!(f.flags & (FP_FIELD_ALTERNATIVE | FP_FIELD_OPTIONAL))) values.push_back(kNan);
  return values;
}

TEST(PolicyRefusals, EveryFieldOutsideItsRange) {
  int refused = 0;
  for (const MethodName& method : AllMethods()) {
    for (const fp_policy_field& field : FieldsOf(method.kind)) {
      if (IsTable(field)) continue;
      for (const double value : Outside(field)) {
        SCOPED_TRACE(method.name + ": " + field.name + "=" + Spelled(value));
        Call call;
        call.policy = AnyPolicy(method.kind);
        call.policy.Set(field, value);
        std::ostringstream expected;
        expected << field.name << " is ";
        if (field.type == FP_FIELD_FLOAT) {
          expected << static_cast<float>(value);
        } else {
          expected << static_cast<int32_t>(value);
        }
        EXPECT_EQ(RefusalOf(call), expected.str() + "; it must be " + RangeOf(field));
        ++refused;
      }
    }
  }
  EXPECT_GT(refused, 200);
}

// Lets a table of a policy point at memory.
void SetTable(AnyPolicy& policy, const fp_policy_field& field, const void* table, int32_t rows) {
  std::memcpy(policy.bytes + field.offset, &table, sizeof table);
  std::memcpy(policy.bytes + field.count_offset, &rows, sizeof rows);
}

TEST(PolicyRefusals, EveryTableOfAnotherLengthOrWithoutMemory) {
  const std::vector<int32_t> memory(64);
  int tables = 0;
  for (const MethodName& method : AllMethods()) {
    for (const fp_policy_field& field : FieldsOf(method.kind)) {
      if (!IsTable(field)) continue;
      SCOPED_TRACE(method.name + ": " + field.name);
      Call call;
      call.policy = AnyPolicy(method.kind);
      for (const int32_t rows : {kHeads - 1, kHeads + 1, 99, -1, INT32_MAX, INT32_MIN}) {
        SetTable(call.policy, field, memory.data(), rows);
        EXPECT_EQ(RefusalOf(call),
                  "head_count is " + std::to_string(rows) + "; it must be the problem's q_heads (4), or 0: no list");
      }
      SetTable(call.policy, field, nullptr, kHeads);
      EXPECT_EQ(RefusalOf(call).find(std::string(field.name) + " is NULL; it must be the address of the "), 0u)
          << fp_last_error();
      ++tables;
    }
  }
  EXPECT_GE(tables, 2);
}

TEST(PolicyRefusals, SharedHeadsWhereEachHeadSelectsForItself) {
  int refused = 0;
  for (const MethodName& method : AllMethods()) {
    if (HasField(method.kind, "share_heads")) continue;
    Call call;
    call.policy = Shared(AnyPolicy(method.kind));
    EXPECT_EQ(RefusalOf(call),
              "share_heads is 1; it must be 0 for this policy: each of its query heads has a list of its own")
        << method.name;
    ++refused;
  }
  EXPECT_GE(refused, 7);
}

TEST(PolicyRefusals, EveryPolicyByItsDefaultsRuns) {
  for (const MethodName& method : AllMethods()) {
    Call call;
    call.policy = AnyPolicy(method.kind);
    size_t bytes = 0;
    EXPECT_EQ(fp_prefill_workspace(&call.problem, call.policy.get(), &call.exec, &bytes), FP_OK) << fp_last_error();
    call.memory.resize(bytes + 128);
    call.workspace = Call::Align(call.memory.data());
    call.workspace_bytes = bytes;
    EXPECT_EQ(call.Prefill(), FP_OK) << method.name << ": " << fp_last_error();
  }
}

// ---------------------------------------------------------------- messages word for word

struct Refusal {
  const char* name;
  const char* policy;                               // as text
  std::vector<std::pair<const char*, double>> sets; // fields that are changed afterwards
  const char* message;
};

void PrintTo(const Refusal& r, std::ostream* os) { *os << r.name; }

constexpr const char* kOneDecides =
    "mass is 0.95; it must be given where alpha and gain are NaN, and NaN where one of them is given: one decides";

// For a problem of 4 query heads with head_dim 16.
const Refusal kRefusals[] = {
    {"block_size_odd", "flashprefill", {{"block_size", 100}}, "block_size is 100; it must be a multiple of 16"},
    {"block_size_zero", "flashprefill", {{"block_size", 0}}, "block_size is 0; it must be from 16 to 1024"},
    {"tail",
     "flashprefill",
     {{"dense_tail_blocks", 1 << 30}},
     "dense_tail_blocks is 1073741824; it must be from 0 to 16777216"},
    {"share_heads", "flashprefill", {{"share_heads", 2}}, "share_heads is 2; it must be 0 or 1"},
    {"alpha_negative", "flashprefill", {{"alpha", -0.1}}, "alpha is -0.1; it must be finite and at least 0"},
    {"alpha_nan", "flashprefill", {{"alpha", kNan}}, "alpha is nan; it must be finite and at least 0"},
    {"alpha_inf", "flashprefill", {{"alpha", kInf}}, "alpha is inf; it must be finite and at least 0"},
    {"query_pool", "flashprefill", {{"query_pool", 0}}, "query_pool is 0; it must be from 1 to 128"},
    {"sketch_mass_zero", "sketch", {{"mass", 0}}, "mass is 0; it must be above 0 and at most 1"},
    {"sketch_both", "sketch", {{"alpha", 0.5}}, kOneDecides},
    {"sketch_neither",
     "sketch",
     {{"mass", kNan}},
     "mass is nan; it must be given where alpha and gain are NaN, and NaN where one of them is given: one decides"},
    {"sketch_mass_and_gain", "sketch", {{"gain", 0.1}}, kOneDecides},
    {"sketch_gain", "sketch", {{"mass", kNan}, {"gain", 1}}, "gain is 1; it must be above 0 and below 1"},
    {"flex_tau", "flexprefill", {{"tau", -1}}, "tau is -1; it must be finite and at least 0"},
    {"flex_min", "flexprefill", {{"min_budget", -1}}, "min_budget is -1; it must be from 0 to 2147483647"},
    {"flex_max",
     "flexprefill",
     {{"max_budget", 511}},
     "max_budget is 511; it must be at least min_budget (512), or 0: no limit"},
    {"flex_cover", "flexprefill", {{"cover", 2}}, "cover is 2; it must be from 0 to 1"},
    {"minference_pattern",
     "minference(heads=[[1, 1, 2], [7, 1, 2], [0, 1, 1], [0, 1, 1]])",
     {},
     "heads[1].pattern is 7; it must be from 0 to 2"},
    {"minference_numbers",
     "minference(heads=[[1, 1, 2], [1, 1, 2], [0, 1, -1], [0, 1, 1]])",
     {},
     "heads[2].b is -1; it must be from 0 to 2147483647"},
    {"minference_corrected",
     "minference(rounding=tokens)",
     {{"mean_correction", 1}},
     "mean_correction is 1; it must be 0 with FP_ROUND_TOKENS: parts of blocks have no mean"},
    {"xattention_threshold",
     "xattention",
     {{"threshold", 1.5}},
     "threshold is 1.5; it must be at least 0 and at most 1"},
    {"xattention_norm", "xattention", {{"norm", 0}}, "norm is 0; it must be finite and above 0"},
    {"xattention_stride", "xattention", {{"stride", 12}}, "stride is 12; it must be 4, 8, 16, 32, 64 or 128"},
    {"xattention_stride_of_block",
     "xattention",
     {{"block_size", 48}, {"stride", 32}},
     "stride is 32; it must be a divisor of block_size (48)"},
    {"xattention_list_value",
     "xattention(head_thresholds=[0.5, -1, 0, 0])",
     {},
     "head_thresholds[1] is -1; it must be at least 0 and at most 1"},
    {"rrattention_stride", "rrattention", {{"stride", 6}}, "stride is 6; it must be 4, 8, 16, 32, 64 or 128"},
    {"sparge_similarity", "spargeattn", {{"similarity", 2}}, "similarity is 2; it must be at least -1 and at most 1"},
    {"sparge_both",
     "spargeattn",
     {{"topk", 0.5}},
     "cdf is 0.98; it must be given where topk is not, and NaN where topk is given: one of the two decides"},
    {"sparge_topk", "spargeattn", {{"cdf", kNan}, {"topk", -1}}, "topk is -1; it must be at least 0 and at most 1"},
    {"prism_rotary_odd", "prism", {{"rotary_dim", 3}}, "rotary_dim is 3; it must be even"},
    {"prism_rotary_above_head_dim", "prism", {{"rotary_dim", 18}}, "rotary_dim is 18; it must be from 0 to 16"},
    {"prism_high_above_head_dim", "prism", {{"high_pairs", 9}}, "high_pairs is 9; it must be from 0 to 8"},
    {"prism_low_above_rotary_dim", "prism(rotary_dim=8)", {{"low_pairs", 5}}, "low_pairs is 5; it must be from 0 to 4"},
    {"prism_interleaved", "prism", {{"interleaved", 2}}, "interleaved is 2; it must be 0 or 1"},
    {"sample_ratio",
     "sampleattention",
     {{"sample_ratio", kInf}},
     "sample_ratio is inf; it must be above 0 and at most 1"},
};

class PolicyRefusalTest : public testing::TestWithParam<Refusal> {};

TEST_P(PolicyRefusalTest, WordForWord) {
  Call call;
  call.policy = Parse(GetParam().policy);
  for (const auto& [name, value] : GetParam().sets) call.policy.Set(FieldOf(call.policy.common.kind, name), value);
  EXPECT_EQ(RefusalOf(call), GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(All, PolicyRefusalTest, testing::ValuesIn(kRefusals),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(PolicyRefusals, TablesWordForWord) {
  for (const auto& [method, table, message] :
       {std::tuple{"minference", "heads", "heads is NULL; it must be the address of the patterns of all heads"},
        {"xattention", "head_thresholds",
         "head_thresholds is NULL; it must be the address of the thresholds of all heads"}}) {
    Call call;
    call.policy = Parse(method);
    SetTable(call.policy, FieldOf(call.policy.common.kind, table), nullptr, kHeads);
    EXPECT_EQ(RefusalOf(call), message);
  }
}

TEST(PolicyRefusals, FillingAStruct) {
  AnyPolicy policy(FP_SKETCH);
  EXPECT_EQ(fp_policy_init(FP_SKETCH, nullptr, 100), FP_INVALID_ARGUMENT);
  EXPECT_STREQ(fp_last_error(), "policy is NULL; it must be the address of a policy");
  EXPECT_EQ(fp_policy_init(FP_SKETCH, &policy, 8), FP_INVALID_ARGUMENT);
  EXPECT_STREQ(fp_last_error(), "size is 8; it must be the size of that policy's struct (64)");
  EXPECT_EQ(fp_policy_init(99, &policy, sizeof policy), FP_INVALID_ARGUMENT);
  EXPECT_STREQ(fp_last_error(), "kind is 99; it must be one of fp_policy_kind");
}

} // namespace
} // namespace flashprefill::test
