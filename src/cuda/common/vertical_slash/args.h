// What the launches of the vertical-slash family (FlexPrefill, MInference, the mask of SampleAttention) read and write.
// Plain C++.
// docs/hopper-select.md has the order of the launches.
//
// A head's *probe rows* are its last `rows` query rows (all of a shorter sequence), counted from the last one: row r
// stands at position k_len - 1 - r, so it sees key t if t + r < k_len, and the key lies k_len - 1 - (t + r) behind it.
// Sums by slash are therefore kept by t + r, "from the far end". A product takes `columns` rows; a head's rows are
// `parts` products. Keys are cut into chunks, one per CTA; chunk i of sequence b is *slot* MeanBase(..) + i, as blocks
// of that size would be.
#ifndef FLASHPREFILL_CUDA_COMMON_VERTICAL_SLASH_ARGS_H_
#define FLASHPREFILL_CUDA_COMMON_VERTICAL_SLASH_ARGS_H_

#include <cuda_runtime_api.h>

#include "cuda/common/radix_threshold.cuh"
#include "cuda/common/sequence.cuh"
#include "cuda/devices.h"

namespace flashprefill::cuda {

constexpr int kMaxTableHeads = 256; // query heads whose patterns travel as a kernel argument

// The part that all launches share. rules.dense_up_to_keys: sequences of at most this many keys are too short.
struct VerticalSlashShape {
  DeviceProblem d;
  TileRules rules;
  float exponent_scale; // softmax_scale * log2(e)
  int least_rows;       // of a sequence that is selected for
  int rows, columns, parts;
  int chunk;           // keys: a multiple of 64, and at least `columns`
  int slot_count;      // of all sequences
  int slots_per_batch; // of one, where keys are not packed
  Divider by_chunk, by_slots, by_page, by_kv, by_units;
};

// Sums of shares by key and by slash, [q_heads, parts, slots, ..] each.
struct SumsArgs {
  VerticalSlashShape shape;
  uint64_t skipped[kMaxTableHeads / 64]; // bit h: head h's sums are not needed
  float* lse;                            // [.., columns]: log2 of a chunk's sum of exponentials, by row
  float* vertical_sums;                  // [.., chunk]
  float* slash_sums; // [.., chunk + columns]: the part past the chunk's end is added to the next one's
};
cudaError_t LaunchSums(const SumsArgs& args, const Gpu& gpu, cudaStream_t stream);
cudaError_t LaunchSumsSm90(const SumsArgs& args, cudaStream_t stream);
cudaError_t LaunchSumsPortable(const SumsArgs& args, cudaStream_t stream);

// The chosen verticals and slashes, by (sequence, query head), as bits.
struct VerticalSlashChoice {
  uint32_t* verticals; // [.., 2 * words of the mask]: key blocks
  uint32_t* slashes;   // FlexPrefill: [.., slash_words]: slashes in blocks. MInference: [.., phases, slash_words]:
                       // whether some slash crosses a block, see TokenChoiceArgs
  int64_t words, slash_words;
};

// FlexPrefill's budgets, pattern, verticals and slashes of blocks.
struct BlockChoiceArgs {
  VerticalSlashShape shape;
  const float *vertical_sums, *slash_sums;
  float gamma, tau;
  int least_blocks, most_blocks; // of a budget; most_blocks 0: no limit
  bool cover_both;
  const void* k_means; // [kv_heads, mean_rows, pitch]; not read where tau is 0
  int64_t mean_rows;
  int pitch;
  int64_t block_room; // blocks of a sequence at most
  float* by_block;    // [batch, q_heads, 3, block_room]: sums by vertical, by slash, logits
  int* budget;        // [batch, q_heads, 2]: blocks
  int* aware;         // [batch, q_heads]: whether the head is query-aware
  VerticalSlashChoice choice;
};
cudaError_t LaunchBlockChoice(const BlockChoiceArgs& args, cudaStream_t stream);

// MInference's best verticals and slashes of tokens. Whether a slash crosses a block on its way through a whole tile
// depends on how far the tile's first position x lies behind the block's first key alone. So that is found out once,
// for x / B - block + kCrossingsBefore, and each `phase` of x % B: there are B / phase_step of them.
constexpr int kCrossingsBefore = 8; // blocks that begin inside a tile, at most
struct TokenChoiceArgs {
  VerticalSlashShape shape;
  const float *vertical_sums, *slash_sums;
  uint64_t skipped[kMaxTableHeads / 64];
  int verticals[kMaxTableHeads], slashes[kMaxTableHeads]; // how many; of head 0 for all heads without a table
  int first_verticals, near_slashes;                      // that rank before all others
  bool table;
  uint32_t *vertical_tokens, *slash_tokens; // [batch, q_heads, token_words]
  int64_t token_words;
  int phase_step; // gcd of tile and block
  VerticalSlashChoice choice;
};
cudaError_t LaunchTokenChoice(const TokenChoiceArgs& args, cudaStream_t stream);

// The pooled map of query-aware heads: rows are blocks of query rows, columns key blocks. The kept entries are set in
// the mask's bits, whose rows are cleared first.
struct MapState {
  double sum;     // of the entries above the searched digits
  uint32_t above; // how many
  uint32_t prefix;
  int passes;     // whether some entry passes the limit; else all are kept
  uint32_t equal; // entries equal to the threshold that are kept
  uint32_t arrived;
};
struct MapArgs {
  VerticalSlashShape shape;
  float gamma;
  const int* aware;
  const void* k_means;
  int64_t mean_rows;
  int pitch;
  int64_t row_room; // rows of the map per head: total_q / block_size + batch
  int panel_room;   // runs of kMapRows rows per head
  Divider by_panel; // kMapRows * block_size query rows
  void* q_means;    // [q_heads, row_room, pitch]
  float* lse;       // [q_heads, row_room]
  uint32_t* equal;  // [q_heads, row_room]
  MapState* state;  // [batch, q_heads]
  uint32_t* counts; // [batch, q_heads, kRadixBins]
  uint64_t* rests;  // the same
  uint64_t* bits;
  int64_t words;
};
constexpr int kMapRows = 64; // per CTA
cudaError_t LaunchMap(const MapArgs& args, const Gpu& gpu, cudaStream_t stream);
cudaError_t LaunchMapSm90(const MapArgs& args, cudaStream_t stream);
cudaError_t LaunchMapPortable(const MapArgs& args, cudaStream_t stream);

// From choices to the mask.
enum HeadPattern : uint8_t { kVerticalSlash, kAShape, kGivenBits }; // the last: bits that the mask has already
struct VerticalSlashMaskArgs {
  VerticalSlashShape shape;
  VerticalSlashChoice choice;
  const uint32_t* slash_tokens; // MInference's; null: slashes are of blocks
  int64_t token_words;
  int phase_step;
  bool cover_both;       // a slash of blocks means the next one too
  const int* aware;      // heads that have bits in the mask already; or null
  bool keeps_everything; // the host knows that no sequence is selected for
  bool table;
  uint8_t pattern[kMaxTableHeads];
  int first[kMaxTableHeads], nearest[kMaxTableHeads]; // tokens, of kAShape
  double window_ratio; // tokens before a tile that are kept, as a share of the sequence's keys
  uint64_t* bits;
  int32_t* counts;   // or null
  int32_t* fallback; // or null
  int64_t words;
  int* attend_counter; // set to zero for an attend that follows; or null
};
cudaError_t LaunchVerticalSlashMask(const VerticalSlashMaskArgs& args, cudaStream_t stream);

#ifdef __CUDACC__

__device__ inline bool KeepsEverything(const VerticalSlashShape& a, const DeviceSequence& s) {
  return s.q_len < a.least_rows || KeepsEverything(a.d.p, a.rules, s);
}

// First slot of a sequence.
__device__ inline int SlotBase(const VerticalSlashShape& a, int b) {
  const Problem& p = a.d.p;
  return PackedKeys(p) ? a.by_chunk(ClampTo(int64_t{p.cu_seqlens_k[b]}, p.total_k)) + b : b * a.slots_per_batch;
}

__device__ inline bool TestBit(const uint64_t (&set)[kMaxTableHeads / 64], int i) {
  return set[i / 64] >> (i % 64) & 1;
}

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

#endif // FLASHPREFILL_CUDA_COMMON_VERTICAL_SLASH_ARGS_H_
