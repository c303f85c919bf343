// The order in which CTAs take query tiles. Items are numbered so that those that follow each other
// share keys and values in L2: KV heads first, in each of them the sequences, in each of them the tiles from the last
// (heaviest) to the first, and of a tile the query heads of the KV head next to each other. A persistent CTA takes the
// next number from one counter; where there are few items, order.cu has put the heaviest first. Device arrays are
// clamped, never trusted.
#ifndef FLASHPREFILL_CUDA_COMMON_ATTEND_TILES_CUH_
#define FLASHPREFILL_CUDA_COMMON_ATTEND_TILES_CUH_

#include "cuda/common/attend/args.h"

namespace flashprefill::cuda {

constexpr int kAbsent = 0x7fffff00; // position of a key that isn't there: past every row's last key

// A query tile, as those that load its keys see it.
struct Work {
  int sequence, kv_head, head; // head: query head of the tile's row 0
  int q_begin, k_begin;        // packed rows before the sequence; 0 for rectangular layouts
  int begin, tokens;           // the tile's, of the sequence
  int k_len;
  int first_position; // of token `begin`; without causal the last key's, so that every row sees everything
  int visible, full;  // blocks, as Tile has them
  int64_t mask_row;
};

__device__ __forceinline__ int QueryBegin(const AttendArgs& p, int b) {
  return p.cu_seqlens_q ? ClampTo(p.cu_seqlens_q[b], p.total_q) : b * p.max_q;
}

__device__ __forceinline__ int QueryLength(const AttendArgs& p, int b) {
  return p.cu_seqlens_q ? max(0, QueryBegin(p, b + 1) - QueryBegin(p, b)) : p.max_q;
}

__device__ __forceinline__ int TilesOf(const AttendArgs& p, int tokens) {
  return p.by_tile(tokens + p.tile_tokens - 1);
}

// Tiles of all sequences, of one head. Called by a whole warp.
__device__ __forceinline__ int TilesOfBatch(const AttendArgs& p) {
  if (!p.cu_seqlens_q) return p.batch * TilesOf(p, p.max_q);
  int tiles = 0;
  for (int b = threadIdx.x % 32; b < p.batch; b += 32) tiles += TilesOf(p, QueryLength(p, b));
  return __reduce_add_sync(~0u, tiles);
}

// The sequence that tile number `tile` of the batch lies in, and its number from that sequence's end. A whole warp.
__device__ __forceinline__ void FindTile(const AttendArgs& p, int tile, int* sequence, int* from_end) {
  if (!p.cu_seqlens_q) {
    *sequence = p.by_tiles(tile);
    *from_end = tile - *sequence * TilesOf(p, p.max_q);
    return;
  }
  const int lane = threadIdx.x % 32;
  for (int base = 0;; base += 32) {
    const int b = base + lane;
    const int mine = b < p.batch ? TilesOf(p, QueryLength(p, b)) : 0;
    int sum = mine; // of the lanes up to this one
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int below = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += below;
    }
    const uint32_t past = __ballot_sync(~0u, sum > tile);
    if (past) {
      const int hit = __ffs(past) - 1;
      *sequence = base + hit;
      *from_end = tile - __shfl_sync(~0u, sum - mine, hit);
      return;
    }
    tile -= __shfl_sync(~0u, sum, 31);
    if (base + 32 >= p.batch) { // cannot happen while the arrays don't change under us
      *sequence = 0;
      *from_end = 0;
      return;
    }
  }
}

// Packed keys before the sequence; 0 for the other layouts.
__device__ __forceinline__ int KeyBegin(const AttendArgs& p, int b) {
  return p.cu_seqlens_k && !p.page_size ? ClampTo(p.cu_seqlens_k[b], p.total_k) : 0;
}

// Keys of the sequence. k_begin: KeyBegin of it.
__device__ __forceinline__ int KeyLength(const AttendArgs& p, int b, int k_begin) {
  const int length = p.seqused_k      ? p.seqused_k[b]
                     : p.cu_seqlens_k ? p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b]
                                      : p.max_k;
  return ClampTo(length, p.cu_seqlens_k && !p.page_size ? min(p.max_k, p.total_k - k_begin) : p.max_k);
}

__device__ __forceinline__ Work DecodeItem(const AttendArgs& p, int item, int tiles_of_batch) {
  Work w;
  const int heads = p.mask_heads; // of a KV head
  const int in_tile = heads * p.section_heads;
  const int in_section_items = tiles_of_batch * in_tile;
  const int section = item / in_section_items;
  const int in_section = item - section * in_section_items;
  const int tile = p.by_in_tile(in_section);
  const int mask_head = section * in_tile + in_section - tile * in_tile;
  w.kv_head = p.by_mask_heads(mask_head);
  w.head = mask_head * p.heads_per_tile;
  int from_end;
  FindTile(p, tile, &w.sequence, &from_end);

  const int q_len = QueryLength(p, w.sequence);
  const int q_begin = QueryBegin(p, w.sequence);
  w.q_begin = p.cu_seqlens_q ? q_begin : 0;
  const int m = max(0, TilesOf(p, q_len) - 1 - from_end);
  w.begin = m * p.tile_tokens;
  w.tokens = min(p.tile_tokens, q_len - w.begin);
  w.mask_row = mask_head * p.tile_rows + p.by_tile(q_begin) + w.sequence + m;

  w.k_begin = KeyBegin(p, w.sequence);
  w.k_len = KeyLength(p, w.sequence, w.k_begin);
  const int blocks = p.by_block(w.k_len + p.block_size - 1);
  if (p.causal) {
    w.first_position = w.k_len - q_len + w.begin;
    const int last_position = w.first_position + w.tokens - 1;
    w.visible = last_position < 0 ? 0 : min(blocks, p.by_block(last_position) + 1);
    w.full = w.first_position < 0 ? 0 : min(w.visible, p.by_block(w.first_position));
  } else {
    w.first_position = w.k_len;
    w.visible = w.full = blocks;
  }
  w.visible = min(w.visible, p.words * 64);
  return w;
}

// Past the last key that any row of the tile sees.
__device__ __forceinline__ int VisibleKeys(const AttendArgs& p, const Work& w) {
  return p.causal ? min(w.k_len, w.first_position + w.tokens) : w.k_len;
}

// Word `index` of the tile's mask row, without bits from `end` on. Called a lane a word.
__device__ __forceinline__ uint64_t MaskWord(const AttendArgs& p, const Work& w, int index) {
  const int left = w.visible - index * 64;
  if (left <= 0) return 0;
  const uint64_t word = p.bits ? __ldg(p.bits + w.mask_row * p.words + index) : ~uint64_t{0};
  return left >= 64 ? word : word & ((uint64_t{1} << left) - 1);
}

constexpr int kGroupBlocks = 32 * 64; // blocks of which a warp holds the mask, a word per lane

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ATTEND_TILES_CUH_
