// Mutates text by the methods' rows: see text_mutator.h.
#include "text_mutator.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>

#include "policy.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace flashprefill::test {
namespace {

int Upto(std::mt19937& random, size_t most) { return static_cast<int>(random() % (most + 1)); }

const std::string& OneOf(std::mt19937& random, const std::vector<std::string>& words) {
  return words[random() % words.size()];
}

std::string Number(std::mt19937& random, double value) {
  std::ostringstream text;
  if (random() % 2) text.precision(17);
  text << value;
  return text.str();
}

std::string RandomValue(std::mt19937& random, const fp_policy_field& f) {
  if (f.type == FP_FIELD_CHOICE) {
    std::istringstream choices(f.choices);
    std::string choice;
    for (int i = Upto(random, static_cast<size_t>(f.most)); i >= 0; --i) choices >> choice;
    return choice;
  }
  if (f.type == FP_FIELD_BOOL) return random() % 2 ? "true" : "false";
  if (f.type == FP_FIELD_FLOAT)
    return Number(random, f.least + std::min(f.most - f.least, 2.0) * Upto(random, 20) / 20);
  const double values[] = {f.least, f.most, f.least * 4, f.least + Upto(random, 100)};
  return Number(random, std::min(values[random() % 4], f.most));
}

std::string RandomTable(std::mt19937& random, const fp_policy_field& f) {
  std::string text = "[";
  for (int rows = Upto(random, 4); rows > 0; --rows) {
    if (f.columns > 1) text += "[";
    for (int c = 0; c < f.columns; ++c) {
      const bool small = c == 0 || random() % 4;
      text += (c ? ", " : "") + Number(random, f.type == FP_FIELD_FLOAT_TABLE ? Upto(random, 10) / 10.0
                                               : small                        ? Upto(random, 2)
                                                                              : Upto(random, 2147483646));
    }
    text += f.columns > 1 ? "], " : ", ";
  }
  return text + "]";
}

} // namespace

std::string RandomPolicyText(std::mt19937& random) {
  const std::vector<MethodName> methods = AllMethods();
  const MethodName& method = methods[random() % methods.size()];
  const std::vector<fp_policy_field> fields = FieldsOf(method.kind);
  std::string text = method.name + "(";
  for (int i = Upto(random, 4); i > 0; --i) {
    const fp_policy_field& f = fields[random() % fields.size()];
    text += std::string(f.name) + "=" + (IsTable(f) ? RandomTable(random, f) : RandomValue(random, f)) + ", ";
  }
  return text + ")";
}

std::vector<std::string> PolicyWords() {
  std::vector<std::string> words = {"(",  ")",    "[",    "]",     ",",  "=",      ", ",         "[[",  "]]",
                                    "'",  "none", "nan",  "true",  "-1", "0",      "1",          "0.5", "1e300",
                                    "16", "128",  "1024", "-1e-7", "3",  "512.25", "2147483647", "inf", " "};
  for (const MethodName& method : AllMethods()) {
    words.push_back(method.name);
    for (const fp_policy_field& field : FieldsOf(method.kind)) {
      words.push_back(std::string(field.name) + "=");
      std::istringstream choices(field.choices);
      for (std::string choice; choices >> choice;) words.push_back(choice);
    }
  }
  return words;
}

} // namespace flashprefill::test

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  using namespace flashprefill::test;
  static const std::vector<std::string> words = TargetWords();
  std::mt19937 random(seed);
  std::string text(reinterpret_cast<const char*>(data), size);
  const size_t begin = random() % (text.size() + 1), count = random() % (std::min<size_t>(text.size() - begin, 12) + 1);
  switch (random() % 8) {
    case 0:
      text = FreshText(random);
      break;
    case 1:
      text += FreshText(random);
      break;
    case 2:
    case 3:
      text.insert(begin, OneOf(random, words));
      break;
    case 4:
      text.replace(begin, count, OneOf(random, words));
      break;
    case 5:
      text.erase(begin, count);
      break;
    default:
      return LLVMFuzzerMutate(data, size, max_size);
  }
  text.resize(std::min(text.size(), max_size));
  std::memcpy(data, text.data(), text.size());
  return text.size();
}
