// Types that the parts of attend share: packed keys of one KV head, the scratch memory of one thread, and the call that
// does one tile.
#ifndef FLASHPREFILL_CPU_ATTEND_TILE_H_
#define FLASHPREFILL_CPU_ATTEND_TILE_H_

#include "core/backend.h"
#include "core/key_list.h"
#include "cpu/attend/kernels.h"
#include "cpu/simd/targets.h"

namespace flashprefill::cpu {

// The kernels for an instruction set and the dtypes of a problem: bf16 products need bf16 in all of q, k and v.
const AttendKernels& AttendKernelsFor(Isa isa, const Problem& p);
// Those in fp32, for any dtypes.
const AttendKernels& AttendF32KernelsFor(Isa isa);

// Packed K and V of some keys.
struct Packed {
  std::byte* k;
  std::byte* v;

  static Packed Take(Workspace& memory, const AttendKernels& kernels, int64_t head_dim, int64_t keys) {
    const int64_t size = DivUp<int64_t>(keys, kGroup) * kGroup * kernels.element_size;
    std::byte* k = memory.Take<std::byte>(size * KeyDepth(head_dim));
    return {k, memory.Take<std::byte>(size * ValueWidth(head_dim))};
  }
};

// What stands for the blocks that are left out: the mean key and value of each as rows, [blocks][head_dim] in
// MeanDtype of k's and v's, and for FP_BLOCK_MEANS packed like keys.
struct MeanRows {
  std::byte* keys;
  std::byte* values;
  Packed packed;
  float* count; // keys that each is the mean of; null: all of its block

  static MeanRows Take(Workspace& memory, const Problem& p, const BlockMask& mask, const AttendKernels& kernels,
                       int64_t blocks) {
    const int64_t elements = blocks * p.head_dim;
    std::byte* keys = memory.Take<std::byte>(elements * DtypeSize(MeanDtype(p.k.dtype)));
    std::byte* values = memory.Take<std::byte>(elements * DtypeSize(MeanDtype(p.v.dtype)));
    const bool packs = mask.mean_correction == FP_BLOCK_MEANS;
    return {keys, values, packs ? Packed::Take(memory, kernels, p.head_dim, blocks) : Packed{}, nullptr};
  }
  // Packs those of `blocks` blocks from `first` on, a multiple of kGroup.
  void Pack(const struct AttendCall& call, int64_t first, int64_t blocks) const;

  float Keys(const Geometry& g, const Sequence& s, int64_t block) const {
    return count ? count[block] : static_cast<float>(g.BlockKeys(s, block));
  }
};

// One call of attend, as all its tiles see it.
struct AttendCall {
  const Problem& p;
  const BlockMask& mask;
  const Output& output;
  const Geometry g;
  const AttendKernels& kernels;     // for packed keys
  const AttendKernels& f32_kernels; // for keys as they lie
  bool stream;                      // out goes past the caches
};

// A thread's own memory.
struct TileScratch {
  TileState state;
  int64_t* offset; // [kTileRows]
  int32_t* limit;  // [2][kTileRows]
  float* bias;     // [kChunk]; with FP_SUMMARY_KEYS [heads_per_tile][kChunk]
  float* lse;      // [kTileRows]
  float* mean;     // [kMaxHeadDim]
  // Where the mask has verticals or slashes: a chunk of keys from anywhere.
  int64_t* extra_key;    // [kChunk]
  int64_t* extra_offset; // [kChunk]
  Packed gathered;
  // Where the mask has key lists: the keys of one of them, and with mean_correction what stands for each block that is
  // left out: the means of its other keys, and how many these are.
  Packed listed;
  MeanRows rest;
  // With FP_SUMMARY_KEYS: up to kChunk of them, before and after they are packed, and the softmax that makes one.
  struct {
    TileState one; // its q: the mean queries of the tile's heads
    std::byte* keys;
    std::byte* values;
    Packed packed;
  } summary;

  static TileScratch Take(Workspace& memory, const AttendCall& call);
};

// What the micro-kernels of a tile write.
TileState TakeTileState(Workspace& memory, int32_t head_dim);

// Nothing is summed yet.
void ClearTile(const TileState& state);

// Tile m of mask head `mask_head`; keys and means are those of its KV head, or with key lists scratch's. `next_key`:
// the first one that the tile after it keeps of the same packed keys, to be fetched ahead; or -1.
void AttendTile(const AttendCall& call, const Sequence& s, int64_t mask_head, int64_t m, const Packed& keys,
                const MeanRows& means, int64_t next_key, TileScratch& scratch);

// The first key that tile m keeps, or -1.
int64_t FirstKey(const AttendCall& call, const Sequence& s, int64_t mask_head, int64_t m);

// All query heads of a KV head, without packed keys: for kFewRows rows or fewer, and no mean correction. Block by
// block, so that a key comes from far away for the first of its heads only.
void AttendFewRows(const AttendCall& call, const Sequence& s, int64_t kv_head, TileScratch& scratch);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_ATTEND_TILE_H_
