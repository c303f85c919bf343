// What the guard's launches read and write. Plain C++; plan.h has their order.
//
// A *unit* is the audited rows of a sequence and KV head, those of its query heads' same stratum next to each other:
// row j * group + g is stratum j of the group's g-th head. A *row tile* is as many of them as a CTA takes, a *piece* a
// run of as many keys. All scratch memory has room for `most_rows` rows per sequence and query head.
#ifndef FLASHPREFILL_CUDA_COMMON_GUARD_ARGS_H_
#define FLASHPREFILL_CUDA_COMMON_GUARD_ARGS_H_

#include <cuda_runtime_api.h>

#include "core/guard_math.h"
#include "core/key_list.h"
#include "cuda/common/sequence.cuh"

namespace flashprefill::cuda {

// What was drawn for a sequence and query head.
struct HeadDraw {
  int sparse; // rows whose tile leaves something out
  int strata; // of them audited
};

// Of an audited row and a piece of its keys: sums of weights 2^(exponent - reference).
struct RowPart {
  float reference; // -inf: nothing was seen
  float total, missed;
  float most; // of the blocks left out the heaviest,
  int block;  // and its number; -1: nothing was missed
};

struct GuardArgs {
  DeviceProblem d;
  TileRules rules; // of the mask
  uint64_t* bits;
  int32_t* counts; // or null
  int64_t words;
  int32_t* key_lists;     // or null
  int64_t list_stride;    // int32 of a list
  int64_t segment_tokens; // of a list's queries
  int segment_tiles, segment_rows, max_keys;
  int mask_heads, group;
  // The guard.
  int rows; // fp_guard's
  GuardSeed seed;
  float exponent_scale; // softmax_scale * log2(e)
  float target, risk;
  int low_outcome; // fp_guard_outcome of a head that keeps too little
  // Results, or null.
  float *recall, *recall_low, *recall_p05, *certificate;
  int32_t *rows_audited, *missed_block, *outcome;
  double* moments;
  // Scratch memory.
  int most_rows;
  HeadDraw* heads;          // [batch, q_heads]
  int32_t* drawn;           // [batch, q_heads, most_rows]: rows of the sequence
  int32_t* sparse_tiles;    // [mask_heads, tile_rows]: of a sequence those that leave something out
  uint64_t* listed;         // [batch, q_heads, most_rows, listed_words]: keys that lists keep; null without lists
  int64_t listed_words;     // 0 without lists
  RowPart* parts;           // [batch, kv_heads, row tiles, pieces, rows of a tile]
  float *recalls, *shares;  // [batch, q_heads, most_rows]: of rows, and the heaviest missed block's share
  int32_t* missed;          // [batch, q_heads, most_rows]: that block
  Moments* head_moments;    // [batch, q_heads]
  int32_t* heads_done;      // [batch]
  int32_t* wanted;          // [batch, mask_heads]: 1 where a head keeps too little
  int32_t* any_wanted;      // 1 if there is such a head
  int row_tiles, tile_rows; // of a unit; rows of a tile
  int pieces, piece_keys;   // whole blocks
  bool any_block;           // GuardStepKeys
};

// Draws the rows of all heads. Of the second audit of a call this and the next three do nothing unless any_wanted.
cudaError_t LaunchGuardDraw(const GuardArgs& args, cudaStream_t stream);
// Marks the keys that lists keep for the rows. Not without lists.
cudaError_t LaunchGuardListed(const GuardArgs& args, cudaStream_t stream);
// The rows' softmax, in parts.
cudaError_t LaunchGuardAuditSm90(const GuardArgs& args, cudaStream_t stream);
cudaError_t LaunchGuardAuditPortable(const GuardArgs& args, cudaStream_t stream);
// What follows, by head and sequence; in the first audit also which heads keep too little.
cudaError_t LaunchGuardReport(const GuardArgs& args, cudaStream_t stream);

// Heads that are wanted keep everything.
cudaError_t LaunchGuardKeepAll(const GuardArgs& args, cudaStream_t stream);
// Heads that are wanted keep the block that an audited row misses most in its tile,
cudaError_t LaunchGuardJoinMissed(const GuardArgs& args, cudaStream_t stream);
// and what another mask of the same geometry keeps; its lists become theirs.
cudaError_t LaunchGuardAdopt(const GuardArgs& args, const uint64_t* more_bits, const int32_t* more_lists,
                             cudaStream_t stream);

// Rows of a CTA of the audit: 99 KiB hold no more beyond head_dim 128.
constexpr int GuardTileRows(int head_dim, bool portable) { return portable && head_dim > 128 ? 64 : 128; }
// Keys of a step. any_block: of several blocks, where these are small, and where keys are looked at one by one.
constexpr int GuardStepKeys(bool any_block, bool portable) { return any_block || portable ? 64 : 128; }

#ifdef __CUDACC__

__device__ __forceinline__ bool GuardSkips(const GuardArgs& a) { return a.seed.draw > 0 && *a.any_wanted == 0; }

// First row of a sequence and head in the arrays of rows.
__device__ __forceinline__ int64_t GuardRowBase(const GuardArgs& a, int b, int head) {
  return (int64_t{b} * a.d.p.q_heads + head) * a.most_rows;
}

// The mask's row of a row of queries.
__device__ __forceinline__ int64_t GuardMaskRow(const GuardArgs& a, const DeviceSequence& s, int head, int tile) {
  return int64_t{head / a.rules.heads_per_tile} * a.rules.tile_rows + s.TileBase(a.rules) + tile;
}

__device__ __forceinline__ int GuardKeysSeen(const GuardArgs& a, const DeviceSequence& s, int row) {
  return a.d.p.causal ? s.prefix + row + 1 : s.k_len;
}

// Word w of a mask row, without bits of blocks from `visible` on.
__device__ __forceinline__ uint64_t GuardVisible(uint64_t word, int w, int visible) {
  const int left = visible - w * 64;
  if (left <= 0) return 0;
  return left >= 64 ? word : word & ((uint64_t{1} << left) - 1);
}

#endif // __CUDACC__

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_GUARD_ARGS_H_
