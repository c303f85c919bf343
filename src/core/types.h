// The C ABI's structs under their C++ names, and the arithmetic that all code shares: where a sequence lies, where a
// key lies, what a tile may see. Nothing here allocates.
#ifndef FLASHPREFILL_CORE_TYPES_H_
#define FLASHPREFILL_CORE_TYPES_H_

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "flashprefill/flashprefill.h"

namespace flashprefill {

using Problem = fp_problem;
using Tensor = fp_tensor;
using Exec = fp_exec;
using Policy = fp_policy;
using BlockMask = fp_block_mask;
using Stats = fp_stats;
using Output = fp_output;

constexpr int kTileRows = 128; // rows of a query tile: what Hopper's matrix units want, and the papers tune for
constexpr double kLog2E = 1.4426950408889634;
constexpr size_t kWorkspaceAlign = 64; // a cache line; every part of a workspace starts on one

template <typename T>
constexpr T DivUp(T a, T b) {
  return (a + b - 1) / b;
}

inline size_t DtypeSize(int32_t dtype) { return dtype == FP_F32 ? 4 : dtype == FP_E4M3 ? 1 : 2; }

// What means of keys or values of this dtype are kept in: three bits of mantissa would lose what a mean is for.
inline int32_t MeanDtype(int32_t dtype) { return dtype == FP_E4M3 ? FP_BF16 : dtype; }

// One sequence of a batch, its lengths read from whichever arrays the problem has. Host-side arrays only.
struct Sequence {
  int index;        // in the batch
  int64_t q_begin;  // rows of q before it
  int64_t q_len;    // Lq
  int64_t k_begin;  // packed keys before it; 0 for the other layouts
  int64_t k_len;    // Lk
  int64_t prefix;   // P = Lk - Lq; 0 without causal, where it has no meaning
  bool final_chunk; // whether a dense tail applies
};

inline Sequence SequenceOf(const Problem& p, int b) {
  Sequence s{};
  s.index = b;
  s.q_begin = p.cu_seqlens_q ? p.cu_seqlens_q[b] : b * p.max_seqlen_q;
  s.q_len = p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b] : p.max_seqlen_q;
  const bool packed_k = p.cu_seqlens_k != nullptr && p.block_table == nullptr;
  s.k_begin = packed_k ? p.cu_seqlens_k[b] : 0;
  s.k_len = p.seqused_k ? p.seqused_k[b] : p.cu_seqlens_k ? p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b] : p.max_seqlen_k;
  s.prefix = p.causal ? s.k_len - s.q_len : 0;
  s.final_chunk = p.final_chunks ? p.final_chunks[b] != 0 : p.final_chunk != 0;
  return s;
}

// What a product of q and k is multiplied by to become an exponent of two.
inline float ExponentScale(const Problem& p) { return static_cast<float>(p.softmax_scale * kLog2E); }

// Element offset of (row i of sequence s, head h) in q or out.
inline int64_t RowOffset(const Problem& p, const int64_t* stride, const Sequence& s, int64_t i, int64_t h) {
  return p.cu_seqlens_q ? (s.q_begin + i) * stride[1] + h * stride[2]
                        : s.index * stride[0] + i * stride[1] + h * stride[2];
}

// Element offset of (key t of sequence s, KV head h) in k or v, through the page table if there is one.
inline int64_t KeyOffset(const Problem& p, const int64_t* stride, const Sequence& s, int64_t t, int64_t h) {
  if (p.block_table) {
    const int64_t page = p.block_table[s.index * p.block_table_stride + t / p.page_size];
    return page * stride[0] + (t % p.page_size) * stride[1] + h * stride[2];
  }
  if (p.cu_seqlens_k) return (s.k_begin + t) * stride[1] + h * stride[2];
  return s.index * stride[0] + t * stride[1] + h * stride[2];
}

// What the stored keys and values of a KV head are multiplied by.
inline float KeyScale(const Problem& p, const Sequence& s, int64_t h) {
  return p.k_scale ? p.k_scale[s.index * p.k_scale_stride[0] + h * p.k_scale_stride[1]] : 1;
}
inline float ValueScale(const Problem& p, const Sequence& s, int64_t h) {
  return p.v_scale ? p.v_scale[s.index * p.v_scale_stride[0] + h * p.v_scale_stride[1]] : 1;
}

// Element offset of (row i of sequence s, query head h) in lse.
inline int64_t LseOffset(const Problem& p, const int64_t* stride, const Sequence& s, int64_t i, int64_t h) {
  return p.cu_seqlens_q ? h * stride[1] + (s.q_begin + i) * stride[2]
                        : s.index * stride[0] + h * stride[1] + i * stride[2];
}

// One query tile of one sequence: which tokens, and which key blocks they may see. Block numbers are of the sequence.
struct Tile {
  int64_t begin, end; // query tokens [begin, end) of the sequence
  int64_t visible;    // blocks [0, visible) are seen by some row
  int64_t full;       // blocks [0, full) are seen whole by every row: no token mask is needed, and correction applies
  int64_t diagonal;   // the block of the first row's own position; [diagonal, visible) are always kept by select
};

// The geometry that a mask and a problem share.
struct Geometry {
  int mask_heads;     // query heads, or KV heads if shared
  int group;          // query heads per KV head
  int heads_per_tile; // query heads whose rows lie in one tile: group if shared, else 1
  int tile_tokens;
  int block_size;
  int64_t tile_rows; // rows of the mask per head
  int64_t words;     // 64-bit words per row

  static Geometry Of(const Problem& p, int block_size, bool share_heads) {
    Geometry g{};
    g.group = p.q_heads / p.kv_heads;
    g.mask_heads = share_heads ? p.kv_heads : p.q_heads;
    g.heads_per_tile = share_heads ? g.group : 1;
    g.tile_tokens = kTileRows / g.heads_per_tile;
    g.block_size = block_size;
    g.tile_rows = p.total_q / g.tile_tokens + p.batch;
    g.words = DivUp<int64_t>(DivUp<int64_t>(p.max_seqlen_k, block_size), 64);
    return g;
  }
  static Geometry Of(const Problem& p, const Policy& policy) {
    return Of(p, policy.block_size, policy.share_heads != 0);
  }
  static Geometry Of(const Problem& p, const BlockMask& m) { return Of(p, m.block_size, m.share_heads != 0); }

  int64_t TileBase(const Sequence& s) const { return s.q_begin / tile_tokens + s.index; }
  int64_t Tiles(const Sequence& s) const { return DivUp<int64_t>(s.q_len, tile_tokens); }
  int64_t Blocks(const Sequence& s) const { return DivUp<int64_t>(s.k_len, block_size); }
  int64_t BlockKeys(const Sequence& s, int64_t block) const { // keys of that block: fewer in the last one
    return std::min<int64_t>(block_size, s.k_len - block * block_size);
  }

  Tile TileOf(const Problem& p, const Sequence& s, int64_t m) const {
    Tile t{};
    t.begin = m * tile_tokens;
    t.end = std::min<int64_t>(t.begin + tile_tokens, s.q_len);
    if (p.causal) {
      t.visible = std::min(Blocks(s), (s.prefix + t.end - 1) / block_size + 1);
      // (P + begin + 1) / B blocks end at or before the first row's position, so that row sees them whole. V2 stops one
      // key earlier, at (P + begin) / B: the block that ends on the first row's own token is its diagonal.
      t.full = std::min(t.visible, (s.prefix + t.begin) / block_size);
      t.diagonal = t.full;
    } else {
      t.visible = t.full = Blocks(s);
      t.diagonal = t.visible;
    }
    return t;
  }

  // Index of the first word of a tile's row in BlockMask::bits; without the words, its index in counts.
  int64_t Row(const Sequence& s, int64_t mask_head, int64_t m) const { return mask_head * tile_rows + TileBase(s) + m; }
};

// Whether the dense tail of Rule 3 covers tile m: the last ceil(dense_tail_blocks * B / tile tokens) tiles.
inline bool InDenseTail(const Geometry& g, const Policy& policy, const Sequence& s, int64_t m) {
  if (!s.final_chunk || policy.dense_tail_blocks <= 0) return false;
  const int64_t tail = DivUp<int64_t>(int64_t{policy.dense_tail_blocks} * policy.block_size, g.tile_tokens);
  return m >= g.Tiles(s) - tail;
}

// Whether a policy keeps this block whatever its score: sink, window, the tile's own diagonal (Rule 3).
inline bool IsForced(const Policy& policy, const Tile& t, int64_t block) {
  const int64_t window_begin = t.diagonal - std::max(0, policy.window_blocks - 1);
  return block < policy.sink_blocks || block >= window_begin;
}

// Whether sink, window and dense tail leave nothing to select in the whole sequence.
inline bool KeepsEverything(const Problem& p, const Geometry& g, const Policy& policy, const Sequence& s) {
  for (int64_t m = g.Tiles(s) - 1; m >= 0; --m) {
    if (InDenseTail(g, policy, s, m)) continue;
    const Tile t = g.TileOf(p, s, m); // the last tile outside the tail sees the most blocks, so it decides
    return policy.sink_blocks >= t.diagonal - std::max(0, policy.window_blocks - 1);
  }
  return true;
}

inline bool TestBit(const uint64_t* row, int64_t block) { return (row[block >> 6] >> (block & 63)) & 1; }
inline void SetBit(uint64_t* row, int64_t block) { row[block >> 6] |= uint64_t{1} << (block & 63); }

// Word w of a row, without the bits of blocks from `visible` on: what attend obeys.
inline uint64_t VisibleWord(const uint64_t* row, int64_t w, int64_t visible) {
  const int64_t left = visible - w * 64;
  if (left <= 0) return 0;
  return left >= 64 ? row[w] : row[w] & ((uint64_t{1} << left) - 1);
}

// Sets bits [0, n) of a row of `words` words and clears the rest.
inline void FillRow(uint64_t* row, int64_t words, int64_t n) {
  for (int64_t w = 0; w < words; ++w) {
    const int64_t left = n - w * 64;
    row[w] = left <= 0 ? 0 : left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
  }
}

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_TYPES_H_
