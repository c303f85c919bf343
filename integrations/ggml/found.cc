// See found.h.
#include "found.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>

namespace flashprefill::ggml {
namespace {

constexpr double kRisk = 1e-3; // fp_guard's, unless it is set
constexpr const char* kNames[Found::kOutcomes] = {"whole", "held", "repaired", "dense", "low"};
constexpr const char* kDone[Found::kOutcomes] = {"", "", "repaired", "made dense", "below the target"};

template <typename... Args>
std::string Format(const char* format, Args... args) {
  char text[160];
  std::snprintf(text, sizeof(text), format, args...);
  return text;
}

} // namespace

int64_t Found::all() const { return std::accumulate(heads, heads + kOutcomes, int64_t{0}); }

void Found::Add(const Found& other) {
  for (int i = 0; i < 3; ++i) moments[i] += other.moments[i];
  for (int i = 0; i < kOutcomes; ++i) heads[i] += other.heads[i];
}

// The empirical Bernstein bound of Maurer and Pontil (COLT 2009, theorem 11).
double Found::at_least() const {
  const double count = moments[0];
  if (count < 2) return count > 0 ? 0 : 1;
  const double mean = moments[1] / count, log = std::log(2 / kRisk);
  const double variance = std::max(0.0, moments[2] - moments[1] * mean) / (count - 1);
  return std::max(0.0, mean - std::sqrt(2 * variance * log / count) - 7 * log / (3 * (count - 1)));
}

std::string Found::Line() const {
  if (heads[FP_GUARD_WHOLE] == all()) return "recall 1.000: nothing was left out";
  std::string done;
  for (int i = 0; i < kOutcomes; ++i) {
    if (heads[i] == 0 || !*kDone[i]) continue;
    done += done.empty() ? Format("%lld of %lld heads %s", static_cast<long long>(heads[i]),
                                  static_cast<long long>(all()), kDone[i])
                         : Format(", %lld %s", static_cast<long long>(heads[i]), kDone[i]);
  }
  return Format("recall %.3f, at least %.3f; ", recall(), at_least()) + (done.empty() ? "all heads hold" : done);
}

std::string Found::Json() const {
  std::string text = Format("{\"recall\": %.6f, \"at_least\": %.6f, \"heads\": %lld", recall(), at_least(),
                            static_cast<long long>(all()));
  for (int i = 0; i < kOutcomes; ++i) text += Format(", \"%s\": %lld", kNames[i], static_cast<long long>(heads[i]));
  return text + "}";
}

void FindingRoom::Offer(int32_t heads, fp_guard& guard) {
  outcome_.assign(heads, FP_GUARD_WHOLE);
  std::fill(moments_, moments_ + 3, 0.0);
  guard.outcome = outcome_.data();
  guard.moments = moments_;
}

Found FindingRoom::Sum() const {
  Found found;
  for (const int32_t outcome : outcome_) ++found.heads[outcome];
  std::copy(moments_, moments_ + 3, found.moments);
  return found;
}

} // namespace flashprefill::ggml
