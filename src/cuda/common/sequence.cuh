// Where a sequence lies and which blocks per tile of it may see, on the device: SequenceOf, Geometry::TileOf and the
// forced blocks of core/types.h, for lengths and page tables that only the device can read. They come from users, so
// they are never trusted: whatever they hold, every index made here stays inside the arrays that the host has
// described. A sequence whose lengths had to be corrected is marked, and select reports it as FP_BAD_SEQUENCE.
#ifndef FLASHPREFILL_CUDA_COMMON_SEQUENCE_CUH_
#define FLASHPREFILL_CUDA_COMMON_SEQUENCE_CUH_

#include "core/types.h"
#include "cuda/common/means.h"

namespace flashprefill::cuda {

constexpr int kMaxFinalChunks = 4096; // sequences a batch may have if they differ in final_chunk: 512 bytes of bits

// A problem as a kernel argument. fp_problem's final_chunks is host memory, so it travels as bits.
struct DeviceProblem {
  Problem p;
  uint64_t final_bits[kMaxFinalChunks / 64];

  // The host has checked that a batch with final_chunks has at most kMaxFinalChunks sequences.
  static DeviceProblem Of(const Problem& problem);
};

// Division of 0 .. 2^31 by a number that the host knows, as a multiplication: a dozen divisions lead from a tile's
// number to the blocks that it sees, at some 40 instructions each otherwise.
struct Divider {
  uint32_t multiplier, shift;

  static Divider Of(int64_t divisor) {
    const uint32_t shift = static_cast<uint32_t>(std::bit_width(static_cast<uint64_t>(divisor - 1)));
    return {static_cast<uint32_t>(((uint64_t{1} << shift) - static_cast<uint64_t>(divisor)) * (uint64_t{1} << 32) /
                                      static_cast<uint64_t>(divisor) +
                                  1),
            shift};
  }
#ifdef __CUDACC__
  __device__ int operator()(int x) const {
    const uint32_t n = static_cast<uint32_t>(x);
    return static_cast<int>((__umulhi(n, multiplier) + n) >> shift);
  }
#endif
};

// The geometry of tiles, and a policy's forced blocks (IsForced and InDenseTail of core/types.h).
struct TileRules {
  int block_size, tile_tokens;
  int heads_per_tile;                  // query heads whose rows lie in one tile
  int units_per_kv;                    // mask heads per KV head
  int tile_rows;                       // rows of the mask per head
  int sink_blocks;                     // clamped to what fits an int
  int window_reach;                    // max(0, window_blocks - 1)
  int tail_tiles;                      // tiles of a dense tail
  int dense_up_to_keys;                // sequences of at most this many keys keep everything
  bool keeps_everything, shared;       // nothing is ever left out (Dense); share_heads
  Divider by_block, by_tile, by_units; // block_size, tile_tokens, units_per_kv

  static TileRules Of(const Problem& p, const Policy& policy);
  static TileRules Of(const Geometry& geometry); // nothing is forced
};

#ifdef __CUDACC__

struct DeviceSequence {
  int index;
  int q_begin, q_len; // q_len is 0 for a sequence whose lengths make no sense
  int k_begin, k_len;
  int prefix;
  bool final_chunk, bad;

  __device__ int Tiles(const TileRules& r) const { return r.by_tile(q_len + r.tile_tokens - 1); }
  __device__ int Blocks(const TileRules& r) const { return r.by_block(k_len + r.block_size - 1); }
  __device__ int TileBase(const TileRules& r) const { return r.by_tile(q_begin) + index; }
};

// x, but from 0 to `most`.
__device__ __forceinline__ int ClampTo(int x, int most) { return min(max(x, 0), most); }
__device__ __forceinline__ int ClampTo(int64_t x, int64_t most) {
  return static_cast<int>(x < 0 ? 0 : x > most ? most : x);
}

// Rows of q before sequence b.
__device__ inline int QueryBegin(const Problem& p, int b) {
  return p.cu_seqlens_q ? ClampTo(int64_t{p.cu_seqlens_q[b]}, p.total_q) : static_cast<int>(b * p.max_seqlen_q);
}

// Packed keys before sequence b; 0 for the other layouts.
__device__ inline int KeyBegin(const Problem& p, int b) {
  return PackedKeys(p) ? ClampTo(int64_t{p.cu_seqlens_k[b]}, p.total_k) : 0;
}

// The page of a paged cache that holds a sequence's keys from index * page_size on; one that the cache does not have
// becomes its first.
__device__ inline int64_t PageAt(const Problem& p, int sequence, int index) {
  const int page = p.block_table[sequence * p.block_table_stride + index];
  return page >= 0 && page < p.page_count ? page : 0;
}

__device__ inline DeviceSequence SequenceAt(const DeviceProblem& d, int b) {
  const Problem& p = d.p;
  DeviceSequence s;
  s.index = b;
  s.bad = false;
  auto checked = [&](int64_t x, int64_t most) {
    const int y = ClampTo(x, most < 0 ? 0 : most);
    s.bad |= y != x;
    return y;
  };
  if (p.cu_seqlens_q) {
    s.q_begin = checked(p.cu_seqlens_q[b], p.total_q);
    s.q_len = checked(int64_t{p.cu_seqlens_q[b + 1]} - p.cu_seqlens_q[b],
                      min(p.max_seqlen_q, p.total_q - static_cast<int64_t>(s.q_begin)));
  } else {
    s.q_begin = static_cast<int>(b * p.max_seqlen_q);
    s.q_len = static_cast<int>(p.max_seqlen_q);
  }
  int64_t room = p.max_seqlen_k;
  s.k_begin = 0;
  if (p.block_table) {
    room = min(room, int64_t{p.pages_per_seq} * p.page_size);
  } else if (p.cu_seqlens_k) {
    s.k_begin = checked(p.cu_seqlens_k[b], p.total_k);
    room = min(room, p.total_k - static_cast<int64_t>(s.k_begin));
    if (p.seqused_k) room = min(room, max(int64_t{0}, int64_t{p.cu_seqlens_k[b + 1]} - p.cu_seqlens_k[b]));
  }
  s.k_len = checked(p.seqused_k      ? int64_t{p.seqused_k[b]}
                    : p.cu_seqlens_k ? int64_t{p.cu_seqlens_k[b + 1]} - p.cu_seqlens_k[b]
                                     : p.max_seqlen_k,
                    room);
  s.bad |= p.causal && s.k_len < s.q_len;
  if (s.bad) s.q_len = 0;
  s.prefix = p.causal ? s.k_len - s.q_len : 0;
  s.final_chunk = p.final_chunks ? (d.final_bits[b / 64] >> (b % 64)) & 1 : p.final_chunk != 0;
  return s;
}

// The last sequence whose base(b) is at most `slot`; bases ascend if cu_seqlens do. Whatever they do, it is a sequence.
template <typename Base>
__device__ int SequenceOfSlot(int batch, int slot, Base&& base) {
  int low = 0, high = batch; // base(low) <= slot < base(high), where the arrays allow it
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (base(middle) <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Row of the mask (of one head) before sequence b: Geometry::TileBase.
__device__ inline int TileBaseOf(const DeviceProblem& d, const TileRules& r, int b) {
  return r.by_tile(QueryBegin(d.p, b)) + b;
}

// Row of the means of a sequence's first block of `block_size` keys.
__device__ inline int64_t MeanBase(const Problem& p, const DeviceSequence& s, int block_size) {
  return MeanBase(PackedKeys(p), s.index, s.k_begin, p.max_seqlen_k, block_size);
}

// Element offset of key t of the sequence for KV head h.
__device__ inline int64_t KeyOffsetAt(const Problem& p, const int64_t* stride, const DeviceSequence& s, int t, int h) {
  if (p.block_table) {
    return PageAt(p, s.index, t / p.page_size) * stride[0] + (t % p.page_size) * stride[1] + h * stride[2];
  }
  if (p.cu_seqlens_k) return (int64_t{s.k_begin} + t) * stride[1] + h * stride[2];
  return s.index * stride[0] + t * stride[1] + h * stride[2];
}

__device__ inline int64_t RowOffsetAt(const Problem& p, const int64_t* stride, const DeviceSequence& s, int i, int h) {
  return p.cu_seqlens_q ? (int64_t{s.q_begin} + i) * stride[1] + h * stride[2]
                        : s.index * stride[0] + i * stride[1] + h * stride[2];
}

struct DeviceTile {
  int begin, end; // query tokens of the sequence
  int visible;    // blocks [0, visible) are seen by some row
  int diagonal;   // blocks [diagonal, visible) are always kept
  int scored;     // blocks [0, scored) are complete at or before the tile's last token: these get an energy
};

__device__ inline DeviceTile TileAt(const Problem& p, const TileRules& r, const DeviceSequence& s, int m) {
  DeviceTile t;
  t.begin = m * r.tile_tokens;
  t.end = min(t.begin + r.tile_tokens, s.q_len);
  const int blocks = s.Blocks(r);
  t.visible = p.causal ? min(blocks, r.by_block(s.prefix + t.end - 1) + 1) : blocks;
  t.diagonal = p.causal ? min(t.visible, r.by_block(s.prefix + t.begin)) : t.visible;
  t.scored = p.causal ? r.by_block(s.prefix + t.end) : t.visible;
  return t;
}

// Tiles [0, FirstDenseTile) of a sequence are not in its dense tail.
__device__ inline int FirstDenseTile(const TileRules& r, const DeviceSequence& s) {
  return s.final_chunk ? max(0, s.Tiles(r) - r.tail_tiles) : s.Tiles(r);
}

// First block of the window; below it and from sink_blocks on nothing is forced.
__device__ inline int WindowBegin(const TileRules& r, const DeviceTile& t) { return t.diagonal - r.window_reach; }

// Whether nothing is selected: the sequence is to stay dense, or sink, window and dense tail leave nothing out. The
// last tile before the tail sees the most, so it decides.
__device__ inline bool KeepsEverything(const Problem& p, const TileRules& r, const DeviceSequence& s) {
  const int tiles = FirstDenseTile(r, s);
  if (tiles == 0 || s.k_len <= r.dense_up_to_keys) return true;
  return r.sink_blocks >= WindowBegin(r, TileAt(p, r, s, tiles - 1));
}

// The reason that select reports for a sequence.
__device__ inline int32_t FallbackOf(const DeviceProblem& d, const TileRules& r, const DeviceSequence& s) {
  return s.bad                        ? FP_BAD_SEQUENCE
         : r.keeps_everything         ? FP_FALLBACK_DENSE
         : KeepsEverything(d.p, r, s) ? FP_FALLBACK_SHORT
                                      : FP_SELECTED;
}

#endif // __CUDACC__

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_SEQUENCE_CUH_
