// What the launches of the pooled family (Prism, SpargeAttn, MInference's block-sparse heads) read and write. Plain
// C++.
//
// A *pooled row* is the mean of `row_tokens` query rows of one head, counted from a sequence's first: a tile's rows, or
// a key block's number of them. Row r of sequence b is row RowBase(b) + r of a head's arrays, as tiles are of a mask.
// 64 of them are a *panel*, panel r / 64 of sequence b is panel PanelBase(b) + r / 64. Where rows are scored in several
// *bands* of dimensions, a row has a logit for each band and key block. Logits are made and read in rounds of some
// panels of all heads, so that their array stays small:
//   logits  [q_heads, panels of the round, bands, 64, logit_stride]: products of means, not scaled
#ifndef FLASHPREFILL_CUDA_COMMON_POOLED_ARGS_H_
#define FLASHPREFILL_CUDA_COMMON_POOLED_ARGS_H_

#include <cuda_runtime_api.h>

#include "cuda/common/sequence.cuh"
#include "cuda/devices.h"

namespace flashprefill::cuda {

constexpr int kPanelRows = 64;       // pooled rows of a CTA of the score kernel
constexpr int kMostBands = 2;        // of dimensions
constexpr int kMaxPooledDim = 256;   // dimensions
constexpr int kMaxPooledHeads = 256; // query heads whose numbers travel as a kernel argument
constexpr int kBandWords = kMaxPooledDim / 32;

// Sets of dimensions, as bits.
struct Bands {
  int count;
  uint32_t dims[kMostBands][kBandWords];
};

struct PooledShape {
  DeviceProblem d;
  TileRules rules;
  int row_tokens;
  int row_room;        // pooled rows per head, at most
  int panel_room;      // panels per head, at most
  int tiles_per_panel; // of the mask
  Bands bands;
  int pitch; // elements of a row of means
  int64_t mean_rows, logit_stride;
  float exponent_scale;                   // softmax_scale * log2(e)
  uint64_t skipped[kMaxPooledHeads / 64]; // bit h: head h is not scored
  int first_panel, end_panel;             // of the round
  void *q_rows, *k_means;                 // [q_heads, row_room, pitch], [kv_heads, mean_rows, pitch]
  float* logits;
  // row_tokens, 64 row_tokens, tiles_per_panel, q_heads, kv_heads, blocks of a sequence at most, page_size
  Divider by_row, by_panel, by_panel_tiles, by_heads, by_kv, by_blocks, by_page;
};

cudaError_t LaunchPooledScoreSm90(const PooledShape& shape, cudaStream_t stream);
cudaError_t LaunchPooledScorePortable(const PooledShape& shape, cudaStream_t stream);

// Pooled rows, into shape.q_rows.
cudaError_t LaunchPooledRows(const PooledShape& shape, cudaStream_t stream);

// How alike rows are: the mean of all cosines between the rows of a run, which is the squared length of the mean of
// their unit vectors; a row of length zero has the unit vector zero. Runs are key blocks, less the mean key of the
// sequence, and the query rows of a tile. The same launches make the pooled rows.
struct SimilarityArgs {
  PooledShape shape;
  float threshold;       // a run is self-similar above it
  float* key_means;      // [kv_heads, mean_rows, pitch]: not rounded, by the pooling pass
  float* center;         // [batch, kv_heads, pitch]: written, the mean key
  uint8_t* similar_keys; // [kv_heads, mean_rows]
  uint8_t* similar_rows; // [q_heads, row_room]
};
cudaError_t LaunchSimilarity(const SimilarityArgs& args, cudaStream_t stream);

// Sums of squares of mean keys, over all dimensions and over each band's, of a sequence's blocks up to each.
struct BandSquares {
  double all, band[kMostBands];
};
cudaError_t LaunchBandSquares(const PooledShape& shape, BandSquares* squares, cudaStream_t stream);

// How logits decide.
enum class PooledRule {
  kLeastMass, // of each band, the smallest set of blocks with the share `share` of the softmax
  kMostMass,  // the top blocks whose shares of the softmax sum to at most `share`, at least one
  kShare,     // the top blocks, the share `share` of all blocks of the sequence rounded down
  kNumber     // of each row of a tile, the top numbers[head] blocks
};

struct PooledKeepArgs {
  PooledShape shape;
  PooledRule rule;
  double share;
  int numbers[kMaxPooledHeads]; // of kNumber
  const uint8_t* similar_keys;  // see SimilarityArgs: other blocks are kept, and other tiles keep everything; or null
  const uint8_t* similar_rows;
  const BandSquares* squares; // [kv_heads, mean_rows] of bands, whose temperature follows from them; or null
  bool choice_alone;          // write what the scores choose, and no forced blocks: another kernel goes on
  uint64_t* bits;
  int32_t *counts, *fallback; // or null
  int* attend_counter;        // set to zero for an attend that follows, or null
  int64_t words;
};

// Whether the scores of a tile of this many blocks fit in shared memory.
bool PooledKeeps(const Gpu& gpu, int64_t max_blocks);
cudaError_t LaunchPooledKeep(const PooledKeepArgs& args, const Gpu& gpu, cudaStream_t stream);

#ifdef __CUDACC__

__device__ inline int RowBase(const PooledShape& a, int b) { return a.by_row(QueryBegin(a.d.p, b)) + b; }
__device__ inline int PanelBase(const PooledShape& a, int b) { return a.by_panel(QueryBegin(a.d.p, b)) + b; }

__device__ inline int PooledRows(const PooledShape& a, const DeviceSequence& s) {
  return a.by_row(s.q_len + a.row_tokens - 1);
}

// Key blocks that a pooled row sees: those that its last query row sees a key of.
__device__ inline int SeenByRow(const PooledShape& a, const DeviceSequence& s, int row) {
  const int blocks = s.Blocks(a.rules);
  if (!a.d.p.causal) return blocks;
  return min(blocks, a.rules.by_block(s.prefix + min((row + 1) * a.row_tokens, s.q_len) - 1) + 1);
}

__device__ inline bool IsSkipped(const PooledShape& a, int head) {
  return head < kMaxPooledHeads && (a.skipped[head / 64] >> (head % 64) & 1);
}

// A logit of block 0 of a row of a panel.
__device__ inline float* LogitsOf(const PooledShape& a, int head, int panel, int band, int row) {
  const int64_t slot = int64_t{head} * (a.end_panel - a.first_panel) + panel - a.first_panel;
  return a.logits + ((slot * a.bands.count + band) * kPanelRows + row) * a.logit_stride;
}

#endif // __CUDACC__

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_POOLED_ARGS_H_
