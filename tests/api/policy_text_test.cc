// Policies as text: what fp_policy_parse reads and refuses, that fp_policy_print is its inverse, and the description of
// fields by fp_policy_field_at.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "policy.h"

namespace flashprefill::test {
namespace {

// Lists of tokens are those of query heads and have no means, so these two fields want blocks.
bool NeedsBlocks(const MethodName& method, const fp_policy_field& field) {
  const std::string name = field.name;
  return HasField(method.kind, "rounding") && (name == "share_heads" || name == "mean_correction");
}

// "prism(mass=0.5)"
template <typename Value>
std::string With(const MethodName& method, const fp_policy_field& field, const Value& value) {
  std::ostringstream text;
  text.precision(17);
  text << method.name << (NeedsBlocks(method, field) ? "(rounding=blocks, " : "(") << field.name << "=" << value << ")";
  return text.str();
}

// The message of a text that is refused.
std::string ErrorOf(const std::string& text) {
  size_t needed = 77;
  EXPECT_EQ(fp_policy_parse(text.c_str(), nullptr, 0, &needed), FP_INVALID_ARGUMENT) << text;
  EXPECT_EQ(needed, 77u) << text;
  return fp_last_error();
}

template <typename Body>
void ForAllFields(const Body& body) {
  for (const MethodName& method : AllMethods()) {
    for (const fp_policy_field& field : FieldsOf(method.kind)) body(method, field);
  }
}

void ExpectSameFields(const AnyPolicy& expected, const AnyPolicy& actual) {
  ASSERT_EQ(actual.common.kind, expected.common.kind);
  ASSERT_EQ(actual.common.struct_size, expected.common.struct_size);
  for (const fp_policy_field& field : FieldsOf(expected.common.kind)) {
    if (IsTable(field)) continue;
    const double want = expected.Get(field), have = actual.Get(field);
    EXPECT_TRUE(want == have || (std::isnan(want) && std::isnan(have)))
        << field.name << ": " << have << ", not " << want;
  }
}

// ---------------------------------------------------------------- rows

TEST(PolicyRows, NamesAndFieldsAreDescribed) {
  EXPECT_EQ(fp_policy_name(-1, nullptr), nullptr);
  EXPECT_EQ(fp_policy_name(static_cast<int32_t>(AllMethods().size()), nullptr), nullptr);
  EXPECT_GE(AllMethods().size(), 11u);
  fp_policy_field field;
  EXPECT_EQ(fp_policy_field_at(FP_PRISM, -1, &field), FP_INVALID_ARGUMENT);
  EXPECT_EQ(fp_policy_field_at(FP_PRISM, 99, &field), FP_INVALID_ARGUMENT);
  EXPECT_EQ(fp_policy_field_at(99, 0, &field), FP_INVALID_ARGUMENT);
  EXPECT_EQ(fp_policy_field_at(FP_PRISM, 0, nullptr), FP_INVALID_ARGUMENT);
  ForAllFields([](const MethodName& method, const fp_policy_field& f) {
    SCOPED_TRACE(method.name + ": " + f.name);
    const AnyPolicy policy(method.kind);
    EXPECT_GT(std::strlen(f.about), 5u);
    EXPECT_LT(f.offset, policy.common.struct_size);
    if (IsTable(f)) {
      EXPECT_GE(f.columns, 1);
      EXPECT_LT(f.count_offset, policy.common.struct_size);
      return;
    }
    EXPECT_LT(f.least, f.most);
    if (f.offset < sizeof(fp_policy)) return; // these have other defaults in every method
    const double initial = policy.Get(f);
    if (std::isnan(f.initial)) {
      EXPECT_TRUE(std::isnan(initial) && (f.flags & (FP_FIELD_ALTERNATIVE | FP_FIELD_OPTIONAL)));
    } else {
      EXPECT_EQ(static_cast<float>(f.initial), static_cast<float>(initial));
      EXPECT_TRUE(f.initial >= f.least && f.initial <= f.most);
    }
    EXPECT_EQ(std::strlen(f.choices) > 0, f.type == FP_FIELD_CHOICE);
  });
}

// ---------------------------------------------------------------- there and back

TEST(PolicyText, EveryMethodByItsName) {
  for (const MethodName& method : AllMethods()) {
    SCOPED_TRACE(method.name);
    const AnyPolicy initial(method.kind);
    ExpectSameFields(initial, Parse(method.name));
    ExpectSameFields(initial, Parse(method.name + "()"));
    ExpectSameFields(initial, Parse(" \t" + method.name + " ( ) \n"));
    std::string loud = method.name;
    for (char& c : loud) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    ExpectSameFields(initial, Parse(loud));
    ExpectSameFields(initial, Parse(Name(initial)));
    EXPECT_EQ(Name(Parse(Name(initial))), Name(initial));
  }
}

TEST(PolicyText, EveryFieldAtItsDefaultAndBounds) {
  ForAllFields([](const MethodName& method, const fp_policy_field& f) {
    if (IsTable(f)) return;
    std::vector<double> values = {AnyPolicy(method.kind).Get(f)};
    if (!(f.flags & FP_FIELD_ABOVE_LEAST)) values.push_back(f.least);
    if (!(f.flags & FP_FIELD_BELOW_MOST))
      values.push_back(std::isinf(f.most) ? std::numeric_limits<float>::max() : f.most);
    if (f.type == FP_FIELD_FLOAT) values.push_back(f.least + std::min(f.most - f.least, 1.0) / 3);
    for (const double value : values) {
      if (std::isnan(value)) continue; // an alternative that is not given has no text
      const std::string text = With(method, f, value);
      SCOPED_TRACE(text);
      const AnyPolicy policy = Parse(text);
      const double stored = f.type == FP_FIELD_FLOAT ? double{static_cast<float>(value)} : value;
      EXPECT_EQ(policy.Get(f), stored);
      AnyPolicy expected(method.kind);
      for (const fp_policy_field& other : FieldsOf(method.kind)) {
        if (other.flags & f.flags & FP_FIELD_ALTERNATIVE) expected.Set(other, NAN);
      }
      if (NeedsBlocks(method, f)) expected.Set(FieldOf(method.kind, "rounding"), FP_ROUND_BLOCKS);
      expected.Set(f, value);
      ExpectSameFields(expected, policy);
      ExpectSameFields(policy, Parse(Name(policy)));
      EXPECT_EQ(Name(Parse(Name(policy))), Name(policy));
    }
  });
}

TEST(PolicyText, EveryFieldBeyondItsBounds) {
  ForAllFields([](const MethodName& method, const fp_policy_field& f) {
    if (IsTable(f)) return;
    std::vector<double> values;
    if (f.type == FP_FIELD_FLOAT) {
      values.push_back(f.flags & FP_FIELD_ABOVE_LEAST ? f.least
                                                      : std::nextafter(static_cast<float>(f.least), -INFINITY));
      values.push_back(f.flags & FP_FIELD_BELOW_MOST ? f.most : std::nextafter(static_cast<float>(f.most), INFINITY));
    } else {
      values.push_back(f.least - 1);
      values.push_back(f.most + 1);
    }
    for (const double value : values) {
      const std::string text = With(method, f, value), message = ErrorOf(text);
      EXPECT_EQ(message.find("policy '" + text + "': " + f.name + " "), 0u) << message;
    }
  });
}

TEST(PolicyText, PrintedIsWhatDecidesAndWhatIsNotADefault) {
  EXPECT_EQ(Name(Parse("Dense")), "dense");
  EXPECT_EQ(Name(Parse("streaming(sink_blocks=3)")), "streaming(sink_blocks=3)");
  EXPECT_EQ(Name(Parse("flashprefill")), "flashprefill(alpha=0.12)");
  EXPECT_EQ(Name(Parse("flashprefill(query_pool=16, share_heads=True, alpha=.25)")),
            "flashprefill(alpha=0.25, query_pool=16, share_heads=true)");
  EXPECT_EQ(Name(Parse("sketch(gain=1e-1,query_metric=1)")), "sketch(gain=0.1, query_metric=true)");
  EXPECT_EQ(Name(Parse("flexprefill(max_budget=4096, cover=both)")),
            "flexprefill(gamma=0.9, max_budget=4096, cover=both)");
  EXPECT_EQ(Name(Parse("minference(rounding='tokens')")), "minference(rounding=tokens)");
}

TEST(PolicyText, PrintingCutsAndRefuses) {
  const AnyPolicy policy = Parse("prism(mass=0.5)");
  const std::string whole = "prism(mass=0.5)";
  EXPECT_EQ(fp_policy_print(policy.get(), nullptr, 0), whole.size());
  char cut[6];
  EXPECT_EQ(fp_policy_print(policy.get(), cut, sizeof cut), whole.size());
  EXPECT_STREQ(cut, "prism");
  char one = 'x';
  EXPECT_EQ(fp_policy_print(policy.get(), &one, 0), whole.size());
  EXPECT_EQ(one, 'x');
  AnyPolicy bad = policy;
  bad.Set(FieldOf(FP_PRISM, "mass"), 2);
  EXPECT_EQ(fp_policy_print(bad.get(), nullptr, 0), 0u);
  EXPECT_STREQ(fp_last_error(), "mass is 2; it must be above 0 and at most 1");
  bad.common.kind = 77;
  EXPECT_EQ(fp_policy_print(bad.get(), nullptr, 0), 0u);
  bad = policy;
  bad.common.struct_size = sizeof(fp_policy);
  EXPECT_EQ(fp_policy_print(bad.get(), nullptr, 0), 0u);
  EXPECT_STREQ(fp_last_error(), "policy.struct_size is 32; it must be the size of the struct: call fp_*_init first");
  EXPECT_EQ(fp_policy_print(nullptr, nullptr, 0), 0u);
  EXPECT_STREQ(fp_last_error(), "policy is NULL; it must be a policy");
  AnyPolicy lost = Parse("xattention(head_thresholds=[0.5])");
  lost.As<fp_xattention>().head_thresholds = nullptr;
  EXPECT_EQ(fp_policy_print(lost.get(), nullptr, 0), 0u);
  EXPECT_STREQ(fp_last_error(), "head_thresholds is NULL; it must be the address of the table");
}

// ---------------------------------------------------------------- values

TEST(PolicyText, OneAlternativeUnsetsTheOthers) {
  int alternatives = 0;
  ForAllFields([&](const MethodName& method, const fp_policy_field& f) {
    if (!(f.flags & FP_FIELD_ALTERNATIVE)) return;
    const AnyPolicy policy = Parse(method.name + "(" + f.name + "=0.5)");
    for (const fp_policy_field& other : FieldsOf(method.kind)) {
      if (!(other.flags & FP_FIELD_ALTERNATIVE)) continue;
      EXPECT_EQ(std::isnan(policy.Get(other)), std::string(other.name) != f.name) << method.name << ": " << other.name;
      if (std::string(other.name) == f.name) continue;
      ErrorOf(method.name + "(" + f.name + "=0.5, " + other.name + "=0.25)");
      ExpectSameFields(policy, Parse(method.name + "(" + other.name + "=none, " + f.name + "=0.5)"));
      ExpectSameFields(policy, Parse(method.name + "(" + f.name + "=0.5, " + other.name + "=NaN)"));
    }
    ++alternatives;
  });
  EXPECT_GE(alternatives, 5);
  EXPECT_EQ(ErrorOf("sketch(mass=none)"),
            "policy 'sketch(mass=none)': mass is nan; it must be given where alpha and gain are NaN, and NaN where one "
            "of them is given: one decides");
}

TEST(PolicyText, NoneWhereZeroIsNone) {
  const fp_policy_field field = FieldOf(FP_FLEXPREFILL, "max_budget");
  EXPECT_EQ(Parse("flexprefill(max_budget=none)").Get(field), 0);
  EXPECT_EQ(Parse("flexprefill(max_budget=None)").Get(field), 0);
  EXPECT_EQ(ErrorOf("flexprefill(min_budget=none)"),
            "policy 'flexprefill(min_budget=none)': min_budget must be a number");
}

TEST(PolicyText, NoneWhereAValueFollowsFromOtherFields) {
  int optional = 0;
  ForAllFields([&](const MethodName& method, const fp_policy_field& f) {
    if (!(f.flags & FP_FIELD_OPTIONAL)) return;
    EXPECT_TRUE(std::isnan(f.initial));
    for (const char* none : {"none", "None", "nan"}) {
      ExpectSameFields(AnyPolicy(method.kind), Parse(method.name + "(" + f.name + "=" + none + ")"));
    }
    EXPECT_NE(Name(Parse(With(method, f, f.least))).find(f.name), std::string::npos);
    ++optional;
  });
  EXPECT_GE(optional, 1);
  EXPECT_EQ(Name(Parse("spargeattn(topk=0.5)")), "spargeattn(topk=0.5)");
}

TEST(PolicyText, MessagesAreOneLineWhateverTheTextHolds) {
  EXPECT_EQ(ErrorOf("flash\nprefill(alpha=1)").find("policy 'flash\\nprefill(alpha=1)': the name must be one of "), 0u);
  EXPECT_EQ(ErrorOf("sketch(mass=\r\t7)"),
            "policy 'sketch(mass=\\r\\t7)': mass is 7; it must be above 0 and at most 1");
  for (int c = 1; c < 256; ++c) {
    const std::string message = ErrorOf("sketch(mass" + std::string(1, static_cast<char>(c)) + "\033[31m=7)");
    EXPECT_TRUE(std::all_of(message.begin(), message.end(), [](char each) {
      return static_cast<unsigned char>(each) >= 0x20 && each != 0x7f;
    })) << c;
    EXPECT_NE(message.find("\\x1b[31m"), std::string::npos) << message;
  }
}

TEST(PolicyText, NumbersAndWords) {
  const fp_policy_field alpha = FieldOf(FP_FLASHPREFILL, "alpha"), shared = FieldOf(FP_FLASHPREFILL, "share_heads");
  EXPECT_EQ(Parse("flashprefill(alpha=+2)").Get(alpha), 2);
  EXPECT_EQ(Parse("flashprefill(alpha=1e-2)").Get(alpha), 0.01f);
  EXPECT_EQ(Parse("flashprefill(alpha='0.5')").Get(alpha), 0.5);
  EXPECT_EQ(Parse("flashprefill(alpha=1, alpha=0.5)").Get(alpha), 0.5); // the last one counts
  EXPECT_EQ(Parse("flashprefill(share_heads=TRUE)").Get(shared), 1);
  EXPECT_EQ(Parse("flashprefill(share_heads=false)").Get(shared), 0);
  EXPECT_EQ(Parse("flashprefill(share_heads=1)").Get(shared), 1);
  ForAllFields([](const MethodName& method, const fp_policy_field& f) {
    if (f.type != FP_FIELD_CHOICE) return;
    std::istringstream choices(f.choices);
    std::string choice;
    for (int i = 0; choices >> choice; ++i) {
      EXPECT_EQ(Parse(With(method, f, choice)).Get(f), i);
      EXPECT_EQ(Parse(With(method, f, i)).Get(f), i);
      EXPECT_LE(i, f.most);
    }
  });
}

TEST(PolicyText, TablesLieBehindTheStruct) {
  const std::string text = "minference(heads=[[0, 1000, 6096], [1, 128, 1024]])";
  size_t needed = 0;
  ASSERT_EQ(fp_policy_parse(text.c_str(), nullptr, 0, &needed), FP_OK);
  EXPECT_EQ(needed, sizeof(fp_minference) + 2 * sizeof(fp_minference_head));
  std::vector<uint64_t> memory(needed / 8);
  ASSERT_EQ(fp_policy_parse(text.c_str(), memory.data(), needed, nullptr), FP_OK);
  const auto& policy = *reinterpret_cast<const fp_minference*>(memory.data());
  ASSERT_EQ(policy.head_count, 2);
  EXPECT_EQ(reinterpret_cast<const char*>(policy.heads), reinterpret_cast<const char*>(&policy) + sizeof policy);
  EXPECT_EQ(policy.heads[0].b, 6096);
  EXPECT_EQ(policy.heads[1].pattern, FP_A_SHAPE);
  EXPECT_EQ(Name(Parse(text)), text);

  AnyPolicy thresholds = Parse("xattention(head_thresholds=[0.9, .25, 1])");
  ASSERT_EQ(thresholds.As<fp_xattention>().head_count, 3);
  EXPECT_EQ(thresholds.As<fp_xattention>().head_thresholds[1], 0.25f);
  EXPECT_EQ(Name(thresholds), "xattention(threshold=0.9, head_thresholds=[0.9, 0.25, 1])");
  for (const char* none : {"xattention(head_thresholds=[])", "xattention(head_thresholds=none)"}) {
    AnyPolicy policy = Parse(none);
    EXPECT_EQ(policy.As<fp_xattention>().head_count, 0);
    EXPECT_EQ(policy.As<fp_xattention>().head_thresholds, nullptr);
  }
}

// ---------------------------------------------------------------- refusals

TEST(PolicyText, MemoryOfTheCaller) {
  const char* text = "xattention(head_thresholds=[1, 0.5, 0.25])";
  size_t needed = 0;
  ASSERT_EQ(fp_policy_parse(text, nullptr, 0, &needed), FP_OK);
  std::vector<uint64_t> memory(needed / 8 + 1, 0x7777777777777777u);
  const std::vector<uint64_t> untouched = memory;
  size_t again = 0;
  EXPECT_EQ(fp_policy_parse(text, memory.data(), needed - 1, &again), FP_INVALID_ARGUMENT);
  EXPECT_EQ(fp_last_error(), "size is " + std::to_string(needed - 1) + "; it must be at least " +
                                 std::to_string(needed) + " for this policy and its tables");
  EXPECT_EQ(fp_policy_parse(text, reinterpret_cast<char*>(memory.data()) + 4, needed, nullptr), FP_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(fp_last_error()).find("policy is 0x"), 0u);
  EXPECT_NE(std::string(fp_last_error()).find("; it must be aligned to 8 bytes"), std::string::npos);
  EXPECT_EQ(fp_policy_parse("xattention(threshold=7)", memory.data(), needed, nullptr), FP_INVALID_ARGUMENT);
  EXPECT_EQ(memory, untouched);
  EXPECT_EQ(fp_policy_parse(text, memory.data(), needed, &again), FP_OK);
  EXPECT_EQ(again, needed);
  EXPECT_EQ(memory.back(), untouched.back());
  EXPECT_EQ(fp_policy_parse(nullptr, nullptr, 0, nullptr), FP_INVALID_ARGUMENT);
  EXPECT_STREQ(fp_last_error(), "text is NULL; it must be a policy as text");
}

TEST(PolicyText, ErrorsSayWhatIsWrong) {
  const std::string form = ": write a name with or without arguments, like flashprefill(alpha=0.2)";
  std::string names;
  for (const MethodName& method : AllMethods()) names += (names.empty() ? "" : ", ") + method.name;
  const std::pair<const char*, std::string> cases[] = {
      {"", form},
      {"   ", form},
      {"(alpha=1)", form},
      {"prysm", ": the name must be one of " + names},
      {"flashprefill(alpha=1", form},
      {"flashprefill(alpha=1) and more", form},
      {"flashprefill alpha=1", form},
      {"flashprefill(alpha=1 query_pool=2)", form},
      {"flashprefill(0.2)", ": arguments are given by name, like alpha=0.2"},
      {"flashprefill(=0.2)", ": arguments are given by name, like alpha=0.2"},
      {"flashprefill(,)", ": arguments are given by name, like alpha=0.2"},
      {"streaming(alpha=1)",
       ": alpha is unknown; streaming takes block_size, sink_blocks, window_blocks, dense_tail_blocks, share_heads, "
       "mean_correction"},
      {"dense(sink_blocks=1)", ": sink_blocks is unknown; dense takes skip, block_size, share_heads"},
      {"flashprefill(Alpha=1)",
       ": Alpha is unknown; flashprefill takes alpha, query_pool, min_blocks, block_size, sink_blocks, window_blocks, "
       "dense_tail_blocks, share_heads, mean_correction"},
      {"flashprefill(alpha=)", ": alpha must be a plain value"},
      {"flashprefill(alpha=1x)", ": alpha must be a plain value"},
      {"flashprefill(alpha=1e999)", ": alpha must be a plain value"},
      {"flashprefill(alpha='1)", ": alpha must be a plain value"},
      {"flashprefill(alpha=none)", ": alpha must be a number"},
      {"flashprefill(alpha=[1])", ": alpha must be a plain value"},
      {"flashprefill(query_pool=1.5)", ": query_pool must be an integer"},
      {"flashprefill(query_pool=inf)", ": query_pool must be an integer"},
      {"flashprefill(query_pool=3e9)", ": query_pool must be an integer"},
      {"flashprefill(share_heads=yes)", ": share_heads must be a plain value"},
      {"flashprefill(alpha=-1)", ": alpha is -1; it must be finite and at least 0"},
      {"flexprefill(cover=third)", ": cover must be one of first, both"},
      {"flexprefill(cover=2)", ": cover is 2; it must be from 0 to 1"},
      {"xattention(head_thresholds=0.5)", ": head_thresholds must be a list in brackets"},
      {"xattention(head_thresholds=[0.5)", ": head_thresholds must be a list in brackets"},
      {"xattention(head_thresholds=[[0.5]])", ": head_thresholds must be a plain value"},
      {"minference(heads=[1, 2, 3])", ": heads must be a list of lists of 3 numbers"},
      {"minference(heads=[[1, 2]])", ": heads must be a list of lists of 3 numbers"},
      {"minference(heads=[[1, 2, 3, 4]])", ": heads must be a list of lists of 3 numbers"},
      {"minference(heads=[[1, 2.5, 3]])", ": heads must hold integers"},
  };
  for (const auto& [text, why] : cases) EXPECT_EQ(ErrorOf(text), "policy '" + std::string(text) + "'" + why);
}

} // namespace
} // namespace flashprefill::test
