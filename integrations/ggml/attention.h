// One GGML_OP_FLASH_ATTN_EXT node, computed. Rows that the mask shows to be causal sequences go through flashprefill;
// all others (decode rows in a mixed batch, sliding windows, anything that a mask can hold) through the CPU backend's
// own kernel, on views of the same tensors, so that they are what they would be without the plugin.
#ifndef FLASHPREFILL_INTEGRATIONS_GGML_ATTENTION_H_
#define FLASHPREFILL_INTEGRATIONS_GGML_ATTENTION_H_

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "found.h"
#include "ggml-backend-impl.h"
#include "ggml.h"
#include "options.h"
#include "reading.h"

namespace flashprefill::ggml {

// What was done, summed over nodes. Rows count once for each layer.
struct Stats {
  int64_t nodes = 0;
  int64_t sparse_rows = 0;   // the policy chose their blocks
  int64_t dense_rows = 0;    // flashprefill's kernel, all blocks: the policy is Dense, or the sequence too short for it
  int64_t stock_rows = 0;    // left to the CPU backend's kernel when the mask was seen
  int64_t gathered_rows = 0; // of the first two: their keys did not lie in one piece
  int64_t kept = 0, total = 0; // blocks, over heads, of sparse and dense rows
  double select_seconds = 0, attend_seconds = 0, guard_seconds = 0;
  Found found; // by the guard, where there is one

  double density() const { return total > 0 ? static_cast<double>(kept) / static_cast<double>(total) : 1.0; }
  void Add(const Stats& other);
};

// Why a model whose attention is this node stays the CPU backend's, in words; nullptr if it need not.
const char* WhyDense(const ggml_tensor* node);

// Whether the node is one of ours, by its types, shapes and parameters. The mask's contents come only with Compute.
bool Supports(const ggml_tensor* node, const Options& options);

// The memory that calls share. One call at a time.
class Attention {
 public:
  explicit Attention(const Options& options) : options_(options) {}
  ~Attention();
  Attention(const Attention&) = delete;
  Attention& operator=(const Attention&) = delete;

  void set_threads(int threads) { threads_ = threads; }
  // full_batch: query rows of a micro-batch that is full, by which short ones are told.
  ggml_status Compute(ggml_tensor* node, int64_t full_batch, Stats& stats);

 private:
  struct Rows { // of one stream that go to the CPU backend
    int64_t stream, first, count;
  };
  struct Buffer { // grows, is never initialised, begins on a cache line
    void* Reserve(size_t bytes);
    std::unique_ptr<void, decltype(&std::free)> data{nullptr, &std::free};
    size_t bytes = 0;
  };

  bool ComputeRun(ggml_tensor* node, int64_t stream, const Run& run, bool final_chunk, Stats& stats);
  void SetKeys(const ggml_tensor* tensor, int64_t stream, const Run& run, Buffer& converted, fp_problem& p,
               fp_tensor& to);
  ggml_status ComputeStock(ggml_tensor* node, const std::vector<Rows>& rows);

  const Options options_;
  int threads_ = GGML_DEFAULT_N_THREADS;
  ggml_backend_t cpu_ = nullptr; // made when it is first needed
  Reading reading_;
  FindingRoom findings_;
  Buffer workspace_, bits_, counts_, lines_, lists_, kept_, k_, v_;
  std::string warned_; // the last warning, so that it is given once
};

// Writes a line to ggml's log.
void Log(ggml_log_level level, const std::string& line);

} // namespace flashprefill::ggml

#endif // FLASHPREFILL_INTEGRATIONS_GGML_ATTENTION_H_
