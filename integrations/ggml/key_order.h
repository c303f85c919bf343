// The order in which a sequence's keys were read. A policy's sink is its first keys and its window the last, and blocks
// are neighbours in reading; but engines put keys wherever the cache has room. The mask tells the order of a
// micro-batch's own cells and says nothing about those before it.
//
// So the plugin remembers *content*: a fingerprint of a cell's V in a deep layer, and its rank, the number of keys that
// its sequence had before it. V there depends on all tokens up to the cell's own: equal content is the same token after
// the same text, and of the same rank. Content stays what it is when a context shift turns K, and when cells are moved,
// saved and restored, or copied to another sequence.
#ifndef FLASHPREFILL_INTEGRATIONS_GGML_KEY_ORDER_H_
#define FLASHPREFILL_INTEGRATIONS_GGML_KEY_ORDER_H_

#include <cstdint>
#include <limits>
#include <span>
#include <unordered_map>

#include "mask_runs.h"

namespace flashprefill::ggml {

constexpr Rank kUnknown = std::numeric_limits<Rank>::max();
constexpr int64_t kNoCell = -1;
constexpr int64_t kNoLayer = -1;

// The layer that llama.cpp's name of a cache of K says, "cache_k_l3", also with more after it; or kNoLayer.
int64_t LayerOfCache(const char* name);

// The rank of content. Holds what was used lately: at least `most` fingerprints, at most twice as many and one
// micro-batch.
class RankLog {
 public:
  explicit RankLog(size_t most = size_t{1} << 19) : most_(most) {}

  // Forgets what has not been used for long. Between micro-batches only, so that a sequence stays or goes as a whole.
  void BeginBatch();
  Rank Find(uint64_t print);
  // Content that comes after rank `last` in its sequence. Returns its rank: the next one, or what it was known by.
  Rank Note(uint64_t print, Rank last);
  void Clear();

 private:
  std::unordered_map<uint64_t, Rank> recent_, old_;
  size_t most_;
};

// Puts the cells that a run's first row sees in the order in which they were read; `ranks` are theirs, or none at all.
//
// Known cells come first, by their ranks. Unknown ones are newer: decode steps and short prompts, which the plugin
// leaves to the engine. They come in the order of their numbers, with one exception: engines go back to the cache's
// begin when they reach its end or find room before it, so that those behind the run's own cells are older than those
// before it. Where nothing is known the first sink_keys cells are older still, as after a context shift.
// The first row's own cell is the last. `own`: which it is; kNoCell: the one before the next row's.
void OrderKeys(Run& run, std::span<const Rank> ranks, int64_t own, int64_t sink_keys);

} // namespace flashprefill::ggml

#endif // FLASHPREFILL_INTEGRATIONS_GGML_KEY_ORDER_H_
