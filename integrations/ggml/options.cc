// Reads options: the plugin's own here, those of policies by the library's one text form.
#include "options.h"

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace flashprefill::ggml {
namespace {

constexpr const char* kFinalNames[] = {"never", "short", "always"};            // by FinalChunk
constexpr const char* kGuardNames[] = {"none", "observe", "repair", "strict"}; // by fp_guard_mode + 1

std::string Trim(const std::string& text) {
  const size_t begin = text.find_first_not_of(" \t\r"), end = text.find_last_not_of(" \t\r");
  return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
}

[[noreturn]] void Refuse(const std::string& name, const std::string& value, const std::string& must_be) {
  throw std::invalid_argument(name + " is '" + value + "' and must be " + must_be);
}

int64_t WholeNumber(const std::string& name, const std::string& value) {
  char* end;
  const long long number = std::strtoll(value.c_str(), &end, 10);
  if (value.empty() || *end || number < 0 || number > 1 << 24) Refuse(name, value, "a whole number from 0 to 2^24");
  return number;
}

float Share(const std::string& name, const std::string& value) {
  char* end;
  const float number = std::strtof(value.c_str(), &end);
  if (value.empty() || *end || !(number > 0 && number <= 1)) Refuse(name, value, "above 0 and at most 1");
  return number;
}

template <size_t N>
int Choice(const std::string& name, const std::string& value, const char* const (&names)[N]) {
  std::string all;
  for (size_t i = 0; i < N; ++i) {
    if (value == names[i]) return static_cast<int>(i);
    all += std::string(i ? ", " : "") + names[i];
  }
  Refuse(name, value, "one of " + all);
}

// Bounded, so that a mistyped range does not become a list of millions.
int64_t Layer(const std::string& name, const std::string& value) {
  const int64_t layer = WholeNumber(name, value);
  if (layer >= 4096) Refuse(name, value, "layers from 0 to 4095, like 0-2 31");
  return layer;
}

std::vector<int64_t> Layers(const std::string& name, const std::string& value) {
  std::vector<int64_t> layers;
  std::istringstream words(value);
  for (std::string word; words >> word;) {
    const size_t dash = word.find('-');
    const int64_t first = Layer(name, word.substr(0, dash));
    const int64_t last = dash == std::string::npos ? first : Layer(name, word.substr(dash + 1));
    for (int64_t layer = first; layer <= last; ++layer) layers.push_back(layer);
  }
  return layers;
}

// Calls body(name, value) for each option of a text. Commas inside brackets belong to the value.
template <typename Body>
void ForOptions(const std::string& text, const Body& body) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    line = line.substr(0, line.find('#')) + ",";
    int depth = 0;
    for (size_t begin = 0, i = 0; i < line.size(); ++i) {
      depth += (line[i] == '(' || line[i] == '[') - (line[i] == ')' || line[i] == ']');
      if (line[i] != ',' || (depth > 0 && i + 1 < line.size())) continue;
      const std::string item = Trim(line.substr(begin, i - begin));
      begin = i + 1;
      if (item.empty()) continue;
      const size_t equals = item.find('=');
      if (equals == std::string::npos) Refuse("an option", item, "name = value");
      body(Trim(item.substr(0, equals)), Trim(item.substr(equals + 1)));
    }
  }
}

// The fields of a method, by name.
std::map<std::string, fp_policy_field> FieldsOf(int32_t kind) {
  std::map<std::string, fp_policy_field> fields;
  fp_policy_field field;
  for (int32_t i = 0; fp_policy_field_at(kind, i, &field) == FP_OK; ++i) fields[field.name] = field;
  return fields;
}

// The plugin's own options. Returns false for a name that is none of them.
bool SetOwn(Options& o, const std::string& name, const std::string& value) {
  if (name == "min_rows") {
    o.min_rows = WholeNumber(name, value);
  } else if (name == "min_keys") {
    o.min_keys = WholeNumber(name, value);
  } else if (name == "dense_layers") {
    o.dense_layers = Layers(name, value);
  } else if (name == "final_chunk") {
    o.final_chunk = static_cast<FinalChunk>(Choice(name, value, kFinalNames));
  } else if (name == "guard") {
    o.guard = Choice(name, value, kGuardNames) - 1;
  } else if (name == "guard_target") {
    o.guard_target = Share(name, value);
  } else if (name == "log") {
    o.log = Choice(name, value, {"0", "1"}) == 1;
  } else {
    return false;
  }
  return true;
}

// Whether a policy selects by trained weights, which come as addresses.
bool NeedsWeights(const fp_policy& policy) {
  fp_policy_field field;
  for (int32_t i = 0; fp_policy_field_at(policy.kind, i, &field) == FP_OK; ++i) {
    if (field.name == std::string("indexer")) return true;
  }
  return false;
}

} // namespace

Options::Options() { SetPolicy("flashprefill"); }

// A name alone, or a policy as text, "sketch(alpha=0.3)". Its fields begin from their defaults.
void Options::SetPolicy(const std::string& text) {
  const size_t open = text.find('(');
  name_ = Trim(text.substr(0, open));
  fields_.clear();
  ParsePolicy();
  if (open == std::string::npos) return;
  if (text.back() != ')') Refuse("policy", text, "a name, or a name with fields in brackets");
  ForOptions(text.substr(open + 1, text.size() - open - 2),
             [&](const std::string& name, const std::string& value) { SetField(name, value); });
}

void Options::SetField(const std::string& name, const std::string& value) {
  const std::map<std::string, fp_policy_field> known = FieldsOf(policy().kind);
  const auto field = known.find(name);
  if (field == known.end()) {
    std::string all;
    for (const auto& [other, unused] : known) all += (all.empty() ? "" : ", ") + other;
    throw std::invalid_argument(
        "there is no option '" + name + "'; policy " + name_ + " has " + all +
        ", and the plugin policy, min_rows, min_keys, dense_layers, final_chunk, guard, guard_target, log");
  }
  for (const auto& [other, about] : known) { // one alternative takes the place of another
    if (about.flags & field->second.flags & FP_FIELD_ALTERNATIVE) fields_.erase(other);
  }
  fields_[name] = value;
}

void Options::ParsePolicy() {
  std::string text;
  for (const auto& [name, value] : fields_) {
    if (!text.empty()) text += ", ";
    text.append(name).append("=").append(value);
  }
  text = name_ + "(" + text + ")";
  size_t bytes;
  if (fp_policy_parse(text.c_str(), nullptr, 0, &bytes) != FP_OK) throw std::invalid_argument(fp_last_error());
  auto storage = std::make_shared<std::vector<uint64_t>>((bytes + sizeof(uint64_t) - 1) / sizeof(uint64_t));
  fp_policy_parse(text.c_str(), storage->data(), bytes, nullptr);
  if (NeedsWeights(*reinterpret_cast<const fp_policy*>(storage->data()))) {
    throw std::invalid_argument("policy " + name_ + " needs an indexer's weights, which this plugin does not load");
  }
  storage_ = std::move(storage); // copies of these options share it, since its tables are pointed to from inside
}

// `policy` comes first, wherever it stands, because it says which fields there are.
void Options::Apply(const std::string& text, const std::string& from) try {
  Options changed = *this;
  ForOptions(text, [&](const std::string& name, const std::string& value) {
    if (name == "policy") changed.SetPolicy(value);
  });
  ForOptions(text, [&](const std::string& name, const std::string& value) {
    if (name != "policy" && !SetOwn(changed, name, value)) changed.SetField(name, value);
  });
  changed.ParsePolicy();
  *this = std::move(changed);
} catch (const std::invalid_argument& error) {
  throw std::invalid_argument(from + ": " + error.what());
}

void Options::ApplyFile(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::invalid_argument(path + ": can't be read");
  Apply(std::string(std::istreambuf_iterator<char>(file), {}), path);
}

std::string Options::Describe() const {
  std::string text(fp_policy_print(&policy(), nullptr, 0), ' ');
  fp_policy_print(&policy(), text.data(), text.size() + 1);
  return "policy=" + text + " final_chunk=" + kFinalNames[static_cast<int>(final_chunk)] +
         " min_rows=" + std::to_string(min_rows) + " min_keys=" + std::to_string(min_keys) +
         (guard >= 0 ? std::string(" guard=") + kGuardNames[guard + 1] : "");
}

} // namespace flashprefill::ggml
