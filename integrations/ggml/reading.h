// What a context has read: for each micro-batch its runs, their keys in the order in which they were read. One KV cache
// has one mask in all its layers, so this is found out in the first layer of a micro-batch and kept for the others.
#ifndef FLASHPREFILL_INTEGRATIONS_GGML_READING_H_
#define FLASHPREFILL_INTEGRATIONS_GGML_READING_H_

#include <unordered_map>
#include <vector>

#include "ggml.h"
#include "key_order.h"

namespace flashprefill::ggml {

// The layer of the node, by the name that llama.cpp gives its cache; kNoLayer: no such name.
int64_t LayerOf(const ggml_tensor* node);

// Keeps which tensor holds the cells that a node's rows were written to. To be called with every node that the
// scheduler asks about, in their order: the cache's SET_ROWS, then FLASH_ATTN_EXT. Safe in several threads.
void KeepWrittenCells(const ggml_tensor* node);

// Of one backend, which is one context's. One call at a time.
class Reading {
 public:
  // The runs of each stream of a FLASH_ATTN_EXT node, by its mask. To be called for every such node that is computed,
  // before it is. The result holds until the next call.
  const std::vector<std::vector<Run>>& Runs(const ggml_tensor* node, int64_t least_rows, int64_t sink_keys,
                                            int threads);

 private:
  // The cache of one layer's V as rows, of which a cell has one.
  struct Rows {
    int64_t layer = -1;
    const char* data = nullptr;
    size_t bytes = 0;
    int64_t count = 0;
  };
  struct Cache {
    RankLog log;
    Rows witness; // the deepest layer that was seen: what its V is remembered by
    // The micro-batch: its mask, its last layer, its runs.
    const void* mask = nullptr;
    int64_t cells = 0, rows = 0, layer = -1;
    std::vector<std::vector<Run>> streams;
  };

  static void Plan(Cache& cache, const ggml_tensor* node, int64_t least_rows, int64_t sink_keys, int threads);
  static void Note(Cache& cache, const ggml_tensor* node, const Rows& rows, int threads);

  std::unordered_map<const void*, Cache> caches_; // by their memory
};

} // namespace flashprefill::ggml

#endif // FLASHPREFILL_INTEGRATIONS_GGML_READING_H_
