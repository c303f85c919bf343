// FlexPrefill and MInference on the GPU: what their launches read and write. Plain C++. docs/hopper-select.md has the
// order of the launches.
//
// A head's *looked-at rows* are its last `rows` query rows (all of a shorter sequence), counted from the last one: row
// r stands at position k_len - 1 - r, so it sees key t if t + r < k_len, and the key lies k_len - 1 - (t + r) behind
// it. Sums by distance are therefore kept by t + r, "from the far end". A product takes `columns` rows; a head's rows
// are `parts` products. Keys are cut into chunks, one a CTA; chunk i of sequence b is *slot* MeanBase(..) + i, as
// blocks of that size would be.
#ifndef FLASHPREFILL_CUDA_SM90_LINES_H_
#define FLASHPREFILL_CUDA_SM90_LINES_H_

#include <cuda_runtime_api.h>

#include "core/minference.h"
#include "cuda/common/sequence.cuh"

namespace flashprefill::cuda {

constexpr int kMaxLineHeads = 256; // query heads whose patterns travel as a kernel argument
constexpr int kRadixBins = 1024;   // of a radix select (radix.cuh)

// What all launches know.
struct VerticalSlashShape {
  DeviceProblem d;
  TileRules rules;
  float scale_log2; // softmax_scale * log2(e)
  int short_keys;   // a sequence of at most so many keys keeps everything
  int rows, columns, parts;
  int chunk;           // keys: a multiple of 64, and at least `columns`
  int slot_count;      // of all sequences
  int slots_per_batch; // of one, where keys are not packed
  Divider by_chunk, by_slots, by_page, by_kv, by_units;

  bool packed_keys() const { return d.p.cu_seqlens_k && !d.p.block_table; }
};

// Sums of shares by key and by distance, [q_heads, parts, slots, ..] each.
struct LineSumsArgs {
  VerticalSlashShape shape;
  uint64_t skipped[kMaxLineHeads / 64]; // bit h: nobody asks for head h's sums
  float* lse;                           // [.., columns]: log2 of a chunk's sum of exponentials, by row
  float* column;                        // [.., chunk]
  float* diagonal;                      // [.., chunk + columns]: what passes the chunk's end is added to the next one's
};
cudaError_t LaunchLineSums(const LineSumsArgs& args, cudaStream_t stream);

// What is chosen, by (sequence, query head), as bits.
struct LineChoice {
  uint32_t* columns;   // [.., 2 * words of the mask]: key blocks
  uint32_t* distances; // FlexPrefill: [.., distance_words]: distances in blocks. MInference: [.., phases,
                       // distance_words]: whether some distance crosses a block, see TokenArgs
  int64_t words, distance_words;
};

// FlexPrefill's budgets, pattern and lines.
struct FlexArgs {
  VerticalSlashShape shape;
  const float *column, *diagonal;
  float gamma, tau;
  int least_blocks, most_blocks; // of a budget; most_blocks 0: no limit
  bool cover_both;
  const void* k_means; // [kv_heads, mean_rows, pitch]; not read where tau is 0
  int64_t mean_rows;
  int pitch;
  int64_t block_room; // blocks of a sequence at most
  float* by_block;    // [batch, q_heads, 3, block_room]: sums by column, by distance, logits
  int* budget;        // [batch, q_heads, 2]: blocks
  int* aware;         // [batch, q_heads]: whether the head is query-aware
  LineChoice choice;
};
cudaError_t LaunchFlexChoice(const FlexArgs& args, cudaStream_t stream);

// MInference's lines: the best columns and distances, one by one. Whether a distance crosses a block on its way through
// a whole tile depends on how far the tile's first position x lies behind the block's first key alone. So that is found
// out once, for x / B - block + kCrossingsBefore, and each `phase` of x % B: there are B / phase_step of them.
constexpr int kCrossingsBefore = 8; // blocks that begin inside a tile, at most
struct TokenArgs {
  VerticalSlashShape shape;
  const float *column, *diagonal;
  uint64_t skipped[kMaxLineHeads / 64];
  int columns[kMaxLineHeads], distances[kMaxLineHeads]; // how many; of head 0 for all heads without a table
  bool table;
  uint32_t *column_tokens, *distance_tokens; // [batch, q_heads, token_words]
  int64_t token_words;
  int phase_step; // gcd of tile and block
  LineChoice choice;
};
cudaError_t LaunchTokenChoice(const TokenArgs& args, cudaStream_t stream);

// The pooled map of query-aware heads: rows are blocks of query rows, columns key blocks. What it keeps is set in the
// mask's bits, whose rows it clears first.
struct MapState {
  double sum;     // of the entries above the searched digits
  uint32_t above; // how many
  uint32_t prefix;
  int crosses;
  uint32_t equal; // entries equal to the crossing one that are kept
  uint32_t arrived;
};
struct MapArgs {
  VerticalSlashShape shape;
  float gamma;
  const int* aware;
  const void* k_means;
  int64_t mean_rows;
  int pitch;
  int64_t row_room; // rows of the map a head: total_q / block_size + batch
  int panel_room;   // runs of 64 rows a head
  Divider by_panel; // 64 * block_size query rows
  void* q_means;    // [q_heads, row_room, pitch]
  float* lse;       // [q_heads, row_room]
  uint32_t* equal;  // [q_heads, row_room]
  MapState* state;  // [batch, q_heads]
  uint32_t* counts; // [batch, q_heads, kRadixBins]
  uint64_t* rests;  // the same
  uint64_t* bits;
  int64_t words;
};
cudaError_t LaunchMap(const MapArgs& args, cudaStream_t stream);

// From choices to the mask.
enum LinePattern : uint8_t { kLines, kNearAndFirst };
struct LineMaskArgs {
  VerticalSlashShape shape;
  LineChoice choice;
  const uint32_t* distance_tokens; // MInference's; null: distances are of blocks
  int64_t token_words;
  int phase_step;
  bool cover_both;     // a distance of blocks means the next one too
  const int* aware;    // heads that have bits in the mask already; or null
  bool nothing_chosen; // the host knows that everything is kept
  bool table;
  uint8_t pattern[kMaxLineHeads];
  int first[kMaxLineHeads], nearest[kMaxLineHeads]; // tokens, of kNearAndFirst
  uint64_t* bits;
  int32_t* counts;   // or null
  int32_t* fallback; // or null
  int64_t words;
  int* zeroed; // a word that attend wants to be zero, or null
};
cudaError_t LaunchLineMask(const LineMaskArgs& args, cudaStream_t stream);

#ifdef __CUDACC__

// Whether everything is kept without a look.
__device__ inline bool KeepsAll(const VerticalSlashShape& a, const DeviceSequence& s) {
  return s.q_len <= 1 || s.k_len <= a.short_keys || AllForcedAt(a.d.p, a.rules, s);
}

// First slot of a sequence.
__device__ inline int SlotBase(const VerticalSlashShape& a, int b) {
  const Problem& p = a.d.p;
  const bool packed = p.cu_seqlens_k && !p.block_table;
  return packed ? a.by_chunk(Clamp(p.cu_seqlens_k[b], 0, p.total_k)) + b : b * a.slots_per_batch;
}

__device__ inline bool TestBit(const uint64_t (&set)[kMaxLineHeads / 64], int i) { return set[i / 64] >> (i % 64) & 1; }

// Whether one of bits [first, last] is set.
__device__ inline bool AnyBit(const uint32_t* bits, int first, int last) {
  for (int word = first / 32; word <= last / 32 && first <= last; ++word) {
    uint32_t w = bits[word];
    if (word == first / 32) w &= ~0u << (first % 32);
    if (word == last / 32) w &= ~0u >> (31 - last % 32);
    if (w) return true;
  }
  return false;
}

#endif // __CUDACC__

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_LINES_H_
