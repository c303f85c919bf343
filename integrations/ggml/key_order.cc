#include "key_order.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <utility>

namespace flashprefill::ggml {
namespace {

// Engines give rows free cells one after the other: the first row's is the last that it sees before the second row's,
// or, where the cache's end lies between them, the last of all.
int64_t GuessOwn(const Run& run) {
  const auto seen = std::span(run.cells).first(run.seen());
  if (run.rows < 2) return kNoCell;
  const auto next = std::lower_bound(seen.begin(), seen.end(), run.cells[run.seen()]);
  return next == seen.begin() ? seen.back() : *(next - 1);
}

} // namespace

int64_t LayerOfCache(const char* name) {
  constexpr char kBefore[] = "cache_k_l";
  constexpr uint32_t kMost = 1 << 20; // a larger number is no layer's
  const char* number = std::strstr(name, kBefore);
  if (!number) return kNoLayer;
  number += std::strlen(kBefore);
  uint32_t layer;
  const auto read = std::from_chars(number, number + std::strlen(number), layer);
  return read.ec == std::errc() && layer <= kMost ? layer : kNoLayer;
}

void RankLog::BeginBatch() {
  if (recent_.size() < most_) return;
  old_ = std::move(recent_);
  recent_.clear();
}

Rank RankLog::Find(uint64_t print) {
  if (const auto it = recent_.find(print); it != recent_.end()) return it->second;
  const auto it = old_.find(print);
  if (it == old_.end()) return kUnknown;
  recent_.insert(*it);
  return it->second;
}

Rank RankLog::Note(uint64_t print, Rank last) {
  if (const Rank rank = Find(print); rank != kUnknown) return rank;
  recent_.emplace(print, last + 1);
  return last + 1;
}

void RankLog::Clear() {
  recent_.clear();
  old_.clear();
}

void OrderKeys(Run& run, std::span<const Rank> ranks, int64_t own, int64_t sink_keys) {
  const auto seen = std::span(run.cells).first(run.seen());
  const auto later = std::span(run.cells).subspan(run.seen());
  if (own == kNoCell) own = GuessOwn(run);

  std::vector<std::pair<Rank, int32_t>> known;
  std::vector<int32_t> unknown;
  for (size_t i = 0; i < seen.size(); ++i) {
    if (seen[i] == own) continue;
    if (ranks.empty() || ranks[i] == kUnknown) {
      unknown.push_back(seen[i]);
    } else {
      known.emplace_back(ranks[i], seen[i]);
    }
  }
  if (!std::is_sorted(known.begin(), known.end())) std::sort(known.begin(), known.end());
  if (own != kNoCell) {
    const int64_t last = later.empty() ? own : std::max<int64_t>(own, *std::max_element(later.begin(), later.end()));
    const auto behind = std::upper_bound(unknown.begin(), unknown.end(), last);
    const int64_t sink = known.empty() ? std::min<int64_t>(sink_keys, behind - unknown.begin()) : 0;
    std::rotate(unknown.begin() + sink, behind, unknown.end());
  }

  run.known = static_cast<int64_t>(known.size());
  run.last_known = known.empty() ? kNoRank : known.back().first;
  auto to = seen.begin();
  for (const auto& [rank, cell] : known) *to++ = cell;
  to = std::copy(unknown.begin(), unknown.end(), to);
  if (own != kNoCell) *to = static_cast<int32_t>(own);
}

} // namespace flashprefill::ggml
