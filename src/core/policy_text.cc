// The one text form of policies: "sketch(mass=0.9, sink_blocks=2)". Read here for the command line, the options of
// engines' plugins and the torch operators; written for logs and repr. Everything follows from the methods' rows.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/method.h"

namespace flashprefill {
namespace {

constexpr size_t kAlign = 8; // of a policy's struct, and of the tables behind it

std::string Lower(std::string_view text) {
  std::string lower(text);
  for (char& c : lower) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return lower;
}

std::vector<std::string> Words(const char* text) {
  std::vector<std::string> words;
  for (std::string_view left = text; !left.empty();) {
    const size_t space = std::min(left.find(' '), left.size());
    words.emplace_back(left.substr(0, space));
    left.remove_prefix(std::min(space + 1, left.size()));
  }
  return words;
}

std::vector<std::string> FieldNames(const Method& method) {
  std::vector<std::string> names;
  for (int32_t i = 0; FieldAt(method, i); ++i) names.emplace_back(FieldAt(method, i)->name);
  return names;
}

const Field* FindField(const Method& method, const std::string& name) {
  for (int32_t i = 0; FieldAt(method, i); ++i) {
    if (name == FieldAt(method, i)->name) return FieldAt(method, i);
  }
  return nullptr;
}

// A table while its text is read.
struct Table {
  const Field* field;
  std::vector<double> values;
  int64_t rows() const { return static_cast<int64_t>(values.size()) / field->columns; }
  size_t bytes() const { return DivUp(values.size() * 4, kAlign) * kAlign; }
};

// Reads one policy's text from the front to the end.
class Reader {
 public:
  explicit Reader(const char* text) : text_(text), left_(text) {}

  const Method& Name() {
    const std::string name = Word();
    for (const Method* method : Methods()) {
      if (Lower(name) == method->name) return *method;
    }
    std::vector<std::string> names;
    for (const Method* method : Methods()) names.emplace_back(method->name);
    Fail(name.empty() ? "write a name with or without arguments, like flashprefill(alpha=0.2)"
                      : "the name must be one of " + Joined(names, ", "));
  }

  // Reads "(name=value, ...)" into a policy that holds the defaults. Tables are returned.
  std::vector<Table> Arguments(const Method& method, Policy& policy) {
    std::vector<Table> tables;
    bool given = false; // an alternative
    if (Take('(')) {
      while (!Take(')')) {
        const std::string name = Word();
        if (name.empty() || !Take('=')) Fail("arguments are given by name, like alpha=0.2");
        const Field* field = FindField(method, name);
        if (!field) Fail(name + " is unknown; " + method.name + " takes " + Joined(FieldNames(method), ", "));
        if (IsTable(*field)) {
          tables.push_back(ReadTable(*field));
        } else {
          const double value = ReadValue(*field);
          if (field->flags & FP_FIELD_ALTERNATIVE && !std::isnan(value) && !std::exchange(given, true)) {
            Unset(method, policy);
          }
          SetField(policy, *field, value);
        }
        if (!Take(',') && !Peek(')')) Fail("write a name with or without arguments, like flashprefill(alpha=0.2)");
      }
    }
    Skip();
    if (!left_.empty()) Fail("write a name with or without arguments, like flashprefill(alpha=0.2)");
    return tables;
  }

  [[noreturn]] void Fail(const std::string& why) const {
    throw Error(FP_INVALID_ARGUMENT, "policy '" + std::string(text_) + "': " + why);
  }

 private:
  // The alternatives' defaults make room for the one that is given.
  static void Unset(const Method& method, Policy& policy) {
    for (const Field& field : method.fields) {
      if (field.flags & FP_FIELD_ALTERNATIVE) SetField(policy, field, kNotGiven);
    }
  }

  void Skip() {
    while (!left_.empty() && std::strchr(" \t\r\n", left_.front())) left_.remove_prefix(1);
  }

  bool Peek(char c) {
    Skip();
    return !left_.empty() && left_.front() == c;
  }

  bool Take(char c) {
    if (!Peek(c)) return false;
    left_.remove_prefix(1);
    return true;
  }

  // Letters, digits and what numbers are written with.
  std::string Word() {
    Skip();
    size_t n = 0;
    while (n < left_.size() && (std::isalnum(static_cast<unsigned char>(left_[n])) || std::strchr("_.+-", left_[n])))
      ++n;
    std::string word(left_.substr(0, n));
    left_.remove_prefix(n);
    return word;
  }

  double Number(const std::string& name, const std::string& word) {
    double value = 0;
    const char* begin = word.data() + (word.starts_with('+') ? 1 : 0);
    const auto [end, error] = std::from_chars(begin, word.data() + word.size(), value);
    if (word.empty() || error != std::errc() || end != word.data() + word.size()) Fail(name + " must be a plain value");
    return value;
  }

  double ReadValue(const Field& field) {
    const bool quoted = Take('\'') || Take('"');
    const std::string word = Word(), lower = Lower(word);
    if (quoted && !Take('\'') && !Take('"')) Fail(std::string(field.name) + " must be a plain value");
    if (lower == "none" || lower == "nan") {
      if (MayBeNotGiven(field)) return kNotGiven;
      if (field.flags & FP_FIELD_ZERO_IS_NONE && lower == "none") return 0;
      Fail(std::string(field.name) + " must be a number");
    }
    if (field.type == FP_FIELD_CHOICE) {
      const std::vector<std::string> choices = Words(field.choices);
      auto found = std::find(choices.begin(), choices.end(), word);
      if (found == choices.end() && (lower == "true" || lower == "false")) { // as Python spells them
        found = std::find(choices.begin(), choices.end(), lower);
      }
      if (found != choices.end()) return static_cast<double>(found - choices.begin());
      if (word.empty() || !std::isdigit(static_cast<unsigned char>(word[0]))) {
        Fail(std::string(field.name) + " must be one of " + Joined(choices, ", "));
      }
    }
    if (field.type == FP_FIELD_BOOL && (lower == "true" || lower == "false")) return lower == "true";
    const double value = Number(field.name, word);
    if (field.type == FP_FIELD_FLOAT) return value;
    if (value != std::floor(value) || std::abs(value) > kMaxTokens)
      Fail(std::string(field.name) + " must be an integer");
    return value;
  }

  Table ReadTable(const Field& field) {
    Table table{&field, {}};
    if (!Take('[')) {
      if (Lower(Word()) != "none") Fail(std::string(field.name) + " must be a list in brackets");
      return table;
    }
    while (!Take(']')) {
      const bool row = field.columns > 1;
      if (row && !Take('[')) Fail(RowsOf(field));
      for (int32_t c = 0; c < field.columns; ++c) {
        const double value = Number(field.name, Word());
        if (field.type == FP_FIELD_INT_TABLE && (value != std::floor(value) || std::abs(value) > kMaxTokens)) {
          Fail(std::string(field.name) + " must hold integers");
        }
        table.values.push_back(value);
        if (c + 1 < field.columns && !Take(',')) Fail(RowsOf(field));
      }
      if (row && !Take(']')) Fail(RowsOf(field));
      if (!Take(',') && !Peek(']')) Fail(std::string(field.name) + " must be a list in brackets");
    }
    return table;
  }

  static std::string RowsOf(const Field& field) {
    return std::string(field.name) + " must be a list of lists of " + std::to_string(field.columns) + " numbers";
  }

  std::string_view text_, left_;
};

// Writes a table behind the struct and lets the policy point at it. Returns where the next one begins.
std::byte* Store(const Table& table, Policy& policy, std::byte* at) {
  auto* base = reinterpret_cast<std::byte*>(&policy);
  const int32_t rows = static_cast<int32_t>(table.rows());
  std::memcpy(base + table.field->count_offset, &rows, sizeof rows);
  const void* address = rows > 0 ? at : nullptr;
  std::memcpy(base + table.field->offset, &address, sizeof address);
  for (size_t i = 0; i < table.values.size(); ++i) {
    if (table.field->type == FP_FIELD_INT_TABLE) {
      reinterpret_cast<int32_t*>(at)[i] = static_cast<int32_t>(table.values[i]);
    } else {
      reinterpret_cast<float*>(at)[i] = static_cast<float>(table.values[i]);
    }
  }
  return at + table.bytes();
}

template <typename T>
std::string Shortest(T value) {
  char text[64];
  return {text, std::to_chars(text, text + sizeof text, value).ptr};
}

std::string Spelled(const Policy& policy, const Field& field) {
  const double value = FieldValue(policy, field);
  if (field.type == FP_FIELD_BOOL) return value != 0 ? "true" : "false";
  if (field.type == FP_FIELD_CHOICE) return Words(field.choices)[static_cast<size_t>(value)];
  if (field.flags & FP_FIELD_ZERO_IS_NONE && value == 0) return "none";
  if (field.type == FP_FIELD_FLOAT) return Shortest(static_cast<float>(value));
  return Shortest(static_cast<int64_t>(value));
}

std::string SpelledTable(const Policy& policy, const Field& field) {
  const void* address;
  std::memcpy(&address, reinterpret_cast<const std::byte*>(&policy) + field.offset, sizeof address);
  if (!address) Refuse(field.name, "NULL", "the address of the table");
  std::string text = "[";
  for (int32_t i = 0; i < TableRows(policy, field) * field.columns; ++i) {
    const int32_t column = i % field.columns;
    text += i == 0 ? "" : column == 0 && field.columns > 1 ? "], " : ", ";
    text += column == 0 && field.columns > 1 ? "[" : "";
    text += field.type == FP_FIELD_INT_TABLE ? Shortest(static_cast<const int32_t*>(address)[i])
                                             : Shortest(static_cast<const float*>(address)[i]);
  }
  return text + (field.columns > 1 ? "]]" : "]");
}

} // namespace

size_t ParsePolicy(const char* text, void* policy, size_t size) {
  Reader reader(text);
  const Method& method = reader.Name();
  std::vector<uint64_t> own(DivUp(method.size, sizeof(uint64_t))); // so that nothing is written before all is checked
  Policy& parsed = reinterpret_cast<Policy&>(*own.data());
  InitPolicy(method, parsed);
  const std::vector<Table> tables = reader.Arguments(method, parsed);
  try {
    CheckFields(method, parsed);
  } catch (const Error& error) {
    reader.Fail(error.what());
  }
  const size_t begin = DivUp(method.size, kAlign) * kAlign;
  size_t bytes = begin;
  for (const Table& table : tables) bytes += table.bytes();
  if (!policy) return bytes;
  if (size < bytes) Refuse("size", size, "at least " + std::to_string(bytes) + " for this policy and its tables");
  if (reinterpret_cast<uintptr_t>(policy) % kAlign != 0) Refuse("policy", policy, "aligned to 8 bytes");
  std::memcpy(policy, own.data(), method.size);
  std::byte* at = static_cast<std::byte*>(policy) + begin;
  for (const Table& table : tables) at = Store(table, *static_cast<Policy*>(policy), at);
  return bytes;
}

std::string PrintPolicy(const Policy& policy) {
  const Method* method = FindMethod(policy.kind);
  if (!method) Refuse("policy.kind", policy.kind, "one of fp_policy_kind");
  if (policy.struct_size < method->size) {
    Refuse("policy.struct_size", policy.struct_size, "the size of the struct: call fp_*_init first");
  }
  CheckFields(*method, policy);
  std::vector<uint64_t> own(DivUp(method->size, sizeof(uint64_t)));
  Policy& initial = reinterpret_cast<Policy&>(*own.data());
  InitPolicy(*method, initial);
  std::vector<std::string> arguments;
  for (int32_t i = 0; FieldAt(*method, i); ++i) {
    const Field& field = *FieldAt(*method, i);
    if (IsTable(field)) {
      if (TableRows(policy, field) > 0)
        arguments.push_back(std::string(field.name) + "=" + SpelledTable(policy, field));
      continue;
    }
    const double value = FieldValue(policy, field);
    const bool shown = field.flags & FP_FIELD_DECIDES || value != FieldValue(initial, field);
    if (shown && !std::isnan(value)) arguments.push_back(std::string(field.name) + "=" + Spelled(policy, field));
  }
  return std::string(method->name) + (arguments.empty() ? "" : "(" + Joined(arguments, ", ") + ")");
}

} // namespace flashprefill
