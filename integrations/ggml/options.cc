// Options are read in two passes: `policy` first, wherever it stands, because it says which of the others there are.
#include "options.h"

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <sstream>
#include <stdexcept>

namespace flashprefill::ggml {
namespace {

constexpr const char* kPolicyNames[] = {"dense", "streaming", "flashprefill", "sketch"}; // by fp_policy_kind
constexpr const char* kFinalNames[] = {"never", "short", "always"};                      // by FinalChunk
constexpr float kUnset = std::numeric_limits<float>::quiet_NaN();

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

float Number(const std::string& name, const std::string& value) {
  char* end;
  const float number = std::strtof(value.c_str(), &end);
  if (value.empty() || *end || !std::isfinite(number)) Refuse(name, value, "a number");
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

std::vector<int64_t> Layers(const std::string& name, const std::string& value) {
  std::vector<int64_t> layers;
  std::istringstream words(value);
  for (std::string word; words >> word;) {
    const size_t dash = word.find('-');
    const int64_t first = WholeNumber(name, word.substr(0, dash));
    const int64_t last = dash == std::string::npos ? first : WholeNumber(name, word.substr(dash + 1));
    for (int64_t layer = first; layer <= last; ++layer) layers.push_back(layer);
  }
  return layers;
}

using Setter = std::function<void(const std::string& name, const std::string& value)>;

// What there is to set, for the policy that is chosen.
std::map<std::string, Setter> Setters(Options& o) {
  std::map<std::string, Setter> all;
  const auto whole = [&](const char* name, int32_t& field) {
    all[name] = [&field](auto& n, auto& value) { field = static_cast<int32_t>(WholeNumber(n, value)); };
  };
  const auto number = [&](const char* name, float& field, float* other = nullptr) {
    all[name] = [&field, other](auto& n, auto& value) {
      field = Number(n, value);
      if (other) *other = kUnset;
    };
  };
  fp_policy& common = o.policy.common;
  all["policy"] = [](auto&, auto&) {}; // set before the others
  all["min_rows"] = [&o](auto& n, auto& value) { o.min_rows = WholeNumber(n, value); };
  all["min_keys"] = [&o](auto& n, auto& value) { o.min_keys = WholeNumber(n, value); };
  all["dense_layers"] = [&o](auto& n, auto& value) { o.dense_layers = Layers(n, value); };
  all["final_chunk"] = [&o](auto& n, auto& value) {
    o.final_chunk = static_cast<FinalChunk>(Choice(n, value, kFinalNames));
  };
  all["log"] = [&o](auto& n, auto& value) { o.log = Choice(n, value, {"0", "1"}) == 1; };
  whole("block_size", common.block_size);
  if (common.kind == FP_DENSE) return all;
  whole("sink_blocks", common.sink_blocks);
  whole("window_blocks", common.window_blocks);
  whole("dense_tail_blocks", common.dense_tail_blocks);
  whole("share_heads", common.share_heads);
  whole("mean_correction", common.mean_correction);
  if (common.kind == FP_FLASHPREFILL) {
    number("alpha", o.policy.flashprefill.alpha);
    whole("query_pool", o.policy.flashprefill.query_pool);
    whole("min_blocks", o.policy.flashprefill.min_blocks);
  } else if (common.kind == FP_SKETCH) {
    number("alpha", o.policy.sketch.alpha, &o.policy.sketch.mass);
    number("mass", o.policy.sketch.mass, &o.policy.sketch.alpha);
    whole("outliers", o.policy.sketch.outliers);
    whole("query_pool", o.policy.sketch.query_pool);
    whole("min_blocks", o.policy.sketch.min_blocks);
  }
  return all;
}

// Lets the library judge the policy's numbers, on the smallest problem that there is.
void CheckPolicy(const fp_policy& policy) {
  fp_problem p;
  fp_problem_init(&p);
  float element = 0;
  p.batch = p.q_heads = p.kv_heads = p.head_dim = 1;
  p.total_q = p.max_seqlen_q = p.max_seqlen_k = 1;
  p.softmax_scale = 1;
  p.q = p.k = p.v = {&element, FP_F32, 0, {1, 1, 1, 1}};
  size_t bytes;
  if (fp_select_workspace(&p, &policy, nullptr, &bytes) != FP_OK) throw std::invalid_argument(fp_last_error());
}

} // namespace

Options::Options() { fp_policy_init(FP_FLASHPREFILL, &policy, sizeof(fp_flashprefill)); }

void Options::Apply(const std::string& text, const std::string& from) try {
  std::vector<std::pair<std::string, std::string>> pairs;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream items(line.substr(0, line.find('#')));
    for (std::string item; std::getline(items, item, ',');) {
      if (Trim(item).empty()) continue;
      const size_t equals = item.find('=');
      if (equals == std::string::npos) Refuse("an option", Trim(item), "name = value");
      pairs.emplace_back(Trim(item.substr(0, equals)), Trim(item.substr(equals + 1)));
    }
  }
  Options changed = *this;
  for (const auto& [name, value] : pairs) {
    if (name != "policy") continue;
    const int kind = Choice(name, value, kPolicyNames);
    fp_policy_init(kind, &changed.policy,
                   kind == FP_SKETCH         ? sizeof(fp_sketch)
                   : kind == FP_FLASHPREFILL ? sizeof(fp_flashprefill)
                   : kind == FP_STREAMING    ? sizeof(fp_streaming)
                                             : sizeof(fp_dense));
  }
  const std::map<std::string, Setter> setters = Setters(changed);
  for (const auto& [name, value] : pairs) {
    const auto setter = setters.find(name);
    if (setter == setters.end()) {
      std::string all;
      for (const auto& [known, unused] : setters) all += (all.empty() ? "" : ", ") + known;
      throw std::invalid_argument("there is no option '" + name + "'; policy " +
                                  kPolicyNames[changed.policy.common.kind] + " has " + all);
    }
    setter->second(name, value);
  }
  CheckPolicy(changed.policy.common);
  *this = changed;
} catch (const std::invalid_argument& error) {
  throw std::invalid_argument(from + ": " + error.what());
}

void Options::ApplyFile(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::invalid_argument(path + ": can't be read");
  Apply(std::string(std::istreambuf_iterator<char>(file), {}), path);
}

std::string Options::Describe() const {
  std::ostringstream line;
  const fp_policy& p = policy.common;
  line << "policy=" << kPolicyNames[p.kind];
  if (p.kind == FP_FLASHPREFILL) {
    line << " alpha=" << policy.flashprefill.alpha << " query_pool=" << policy.flashprefill.query_pool;
  } else if (p.kind == FP_SKETCH) {
    const bool by_mass = !std::isnan(policy.sketch.mass);
    line << (by_mass ? " mass=" : " alpha=") << (by_mass ? policy.sketch.mass : policy.sketch.alpha)
         << " query_pool=" << policy.sketch.query_pool;
  }
  line << " block_size=" << p.block_size;
  if (p.kind != FP_DENSE) {
    line << " sink_blocks=" << p.sink_blocks << " window_blocks=" << p.window_blocks
         << " dense_tail_blocks=" << p.dense_tail_blocks << " share_heads=" << p.share_heads
         << " mean_correction=" << p.mean_correction;
  }
  line << " final_chunk=" << kFinalNames[static_cast<int>(final_chunk)] << " min_rows=" << min_rows
       << " min_keys=" << min_keys;
  return line.str();
}

} // namespace flashprefill::ggml
