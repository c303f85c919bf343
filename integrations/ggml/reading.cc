#include "reading.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "ggml-backend.h"

namespace flashprefill::ggml {
namespace {

// ---------------------------------------------------------------- the cells that rows were written to

// llama.cpp writes K by SET_ROWS, whose second source lists a cell for each row of the micro-batch. Attention reads the
// cache itself, and has no edge to that node. The scheduler asks about both, each time that a graph is made.
std::mutex g_mutex;                                                      // of the next two
std::unordered_map<const ggml_tensor*, const ggml_tensor*> g_written_to; // by the cache's tensor: of the newest graph
std::unordered_map<const ggml_tensor*, const ggml_tensor*> g_cells_of;   // by the attention node, of the same graph
constexpr size_t kMostNodes = size_t{1} << 14;

const ggml_tensor* Root(const ggml_tensor* t) { return t->view_src ? t->view_src : t; }

// K or V of an attention node as a view of its cache: llama.cpp hands over a copy of an F32 cache, in fp16.
const ggml_tensor* CacheView(const ggml_tensor* t) { return t->op == GGML_OP_CPY && t->src[0] ? t->src[0] : t; }

// Of the rows of a view, in its root, whose first cell this is: they are as far apart as the root's.
bool FirstRow(const ggml_tensor* view, int64_t stream, int64_t& row) {
  const ggml_tensor* root = Root(view);
  const size_t bytes = view->nb[1];
  const size_t offset = static_cast<const char*>(view->data) - static_cast<const char*>(root->data);
  if (bytes == 0 || root->nb[1] != bytes || !ggml_is_contiguous(root) || offset % bytes || view->nb[3] % bytes)
    return false;
  row = static_cast<int64_t>(offset / bytes) + stream * static_cast<int64_t>(view->nb[3] / bytes);
  return true;
}

// The cells of a stream's rows, or nothing: they are not known, or their memory holds something else by now.
const int64_t* WrittenCells(const ggml_tensor* node, int64_t stream, int64_t& first_cell) {
  const int64_t rows = node->src[0]->ne[1], streams = node->src[0]->ne[3];
  const std::lock_guard lock(g_mutex);
  const auto it = g_cells_of.find(node);
  if (it == g_cells_of.end()) return nullptr;
  const ggml_tensor* cells = it->second;
  if (cells->type != GGML_TYPE_I64 || ggml_nelements(cells) != rows * streams || !ggml_is_contiguous(cells) ||
      !cells->data || !cells->buffer || !ggml_backend_buffer_is_host(cells->buffer) ||
      !FirstRow(CacheView(node->src[1]), stream, first_cell))
    return nullptr;
  return static_cast<const int64_t*>(cells->data) + stream * rows;
}

// The cell that a run's first row was written to. The mask says where the others were: they must agree.
int64_t OwnCell(const ggml_tensor* node, int64_t stream, const Run& run) {
  int64_t first_cell;
  const int64_t* written = WrittenCells(node, stream, first_cell);
  if (!written) return kNoCell;
  written += run.first;
  const int32_t* later = run.cells.data() + run.seen();
  for (int64_t i = 1; i < run.rows; ++i) {
    if (written[i] - first_cell != later[i - 1]) return kNoCell;
  }
  const int64_t own = written[0] - first_cell;
  return std::binary_search(run.cells.data(), later, own) ? own : kNoCell;
}

// ---------------------------------------------------------------- fingerprints

// Of up to four pieces of a row of V, as far apart as they can be: 128 values of fp16.
uint64_t Print(const char* row, size_t bytes) {
  constexpr size_t kPieces = 4, kWords = 8, kPiece = kWords * sizeof(uint64_t);
  uint64_t print = bytes;
  const auto mix = [&](const char* from, size_t count) {
    uint64_t word = 0;
    std::memcpy(&word, from, count);
    print = (print ^ word) * 0x9e3779b97f4a7c15;
    print ^= print >> 29;
  };
  if (bytes < kPieces * kPiece) {
    for (size_t at = 0; at < bytes; at += sizeof(uint64_t)) mix(row + at, std::min(sizeof(uint64_t), bytes - at));
  } else {
    for (size_t piece = 0; piece < kPieces; ++piece) {
      const char* from = row + (bytes - kPiece) * piece / (kPieces - 1);
      for (size_t w = 0; w < kWords; ++w) mix(from + w * sizeof(uint64_t), sizeof(uint64_t));
    }
  }
  return print;
}

std::vector<uint64_t> Prints(const char* data, size_t bytes, std::span<const int32_t> cells, int threads) {
  std::vector<uint64_t> prints(cells.size());
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t i = 0; i < cells.size(); ++i) prints[i] = Print(data + cells[i] * bytes, bytes);
  return prints;
}

bool Within(const ggml_tensor* root, const char* data, size_t bytes) {
  const char* base = static_cast<const char*>(ggml_backend_buffer_get_base(root->buffer));
  return data >= base && data + bytes <= base + ggml_backend_buffer_get_size(root->buffer);
}

} // namespace

int64_t LayerOf(const ggml_tensor* node) { return LayerOfCache(Root(CacheView(node->src[1]))->name); }

void KeepWrittenCells(const ggml_tensor* node) {
  if (node->op != GGML_OP_SET_ROWS && node->op != GGML_OP_FLASH_ATTN_EXT) return;
  const std::lock_guard lock(g_mutex);
  if (node->op == GGML_OP_SET_ROWS) {
    if (g_written_to.size() >= kMostNodes) g_written_to.clear();
    g_written_to[Root(node)] = node->src[1];
    return;
  }
  if (g_cells_of.size() >= kMostNodes) g_cells_of.clear();
  const auto it = g_written_to.find(Root(CacheView(node->src[1])));
  if (it != g_written_to.end()) {
    g_cells_of[node] = it->second;
  } else {
    g_cells_of.erase(node);
  }
}

const std::vector<std::vector<Run>>& Reading::Runs(const ggml_tensor* node, int64_t least_rows, int64_t sink_keys,
                                                   int threads) {
  const ggml_tensor *v = CacheView(node->src[2]), *mask = node->src[3], *root = Root(v);
  int64_t layer = LayerOf(node), first_row = 0;
  if (!v->view_src || !root->buffer || !FirstRow(v, 0, first_row)) layer = -1;
  Cache& cache = caches_[layer < 0 ? nullptr : root->buffer];
  const bool same = layer > cache.layer && mask->data == cache.mask && mask->ne[0] == cache.cells &&
                    node->src[0]->ne[1] == cache.rows &&
                    node->src[0]->ne[3] == static_cast<int64_t>(cache.streams.size());
  if (!same) Plan(cache, node, least_rows, sink_keys, threads);
  cache.layer = layer;
  // In layer 0 V says nothing but the token.
  if (layer > 0 && layer >= cache.witness.layer) {
    Note(cache, node, {layer, static_cast<const char*>(root->data), root->nb[1], ggml_nrows(root)}, threads);
  }
  return cache.streams;
}

void Reading::Plan(Cache& cache, const ggml_tensor* node, int64_t least_rows, int64_t sink_keys, int threads) {
  const ggml_tensor *q = node->src[0], *v = CacheView(node->src[2]), *mask = node->src[3];
  const Rows& witness = cache.witness;
  cache.mask = mask->data;
  cache.cells = mask->ne[0];
  cache.rows = q->ne[1];
  cache.streams.clear();
  cache.log.BeginBatch();
  for (int64_t stream = 0; stream < q->ne[3]; ++stream) {
    const auto* bits = static_cast<const char*>(mask->data) + (mask->ne[3] == 1 ? 0 : stream * mask->nb[3]);
    auto& runs =
        cache.streams.emplace_back(FindRuns(reinterpret_cast<const uint16_t*>(bits), q->ne[1], mask->ne[0],
                                            static_cast<int64_t>(mask->nb[1] / sizeof(uint16_t)), least_rows, threads));
    for (Run& run : runs) {
      if (!run.causal()) continue;
      std::vector<Rank> ranks;
      int64_t first = 0;
      if (witness.layer > 0 && ggml_nrows(Root(v)) == witness.count &&
          Within(Root(v), witness.data, witness.bytes * witness.count) && FirstRow(v, stream, first)) {
        for (uint64_t print : Prints(witness.data + first * witness.bytes, witness.bytes,
                                     std::span(run.cells).first(run.seen()), threads)) {
          ranks.push_back(cache.log.Find(print));
        }
      }
      OrderKeys(run, ranks, OwnCell(node, stream, run), sink_keys);
    }
  }
}

// Remembers a micro-batch by a layer whose V is written already: its own cells, and those that were not known.
void Reading::Note(Cache& cache, const ggml_tensor* node, const Rows& rows, int threads) {
  const bool deeper = rows.layer > cache.witness.layer;
  if (deeper) cache.log.Clear();
  cache.witness = rows;
  for (size_t stream = 0; stream < cache.streams.size(); ++stream) {
    int64_t first;
    if (!FirstRow(CacheView(node->src[2]), static_cast<int64_t>(stream), first)) continue;
    for (const Run& run : cache.streams[stream]) {
      if (!run.causal()) continue;
      Rank last = deeper ? kNoRank : run.last_known;
      for (uint64_t print : Prints(rows.data + first * rows.bytes, rows.bytes,
                                   std::span(run.cells).subspan(deeper ? 0 : run.known), threads)) {
        last = std::max(last, cache.log.Note(print, last));
      }
    }
  }
}

} // namespace flashprefill::ggml
