// Shared memory of the attend kernel: the stages of Q, K and V, and the structs that producer and math warpgroups
// exchange.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_SHARED_MEMORY_CUH_
#define FLASHPREFILL_CUDA_SM90_ATTEND_SHARED_MEMORY_CUH_

#include "cuda/common/attend/tile_list.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/ring.cuh"
#include "cuda/sm90/attend/params.h"

namespace flashprefill::cuda {

// A query tile, as the producer announces it together with its Q.
struct TileInfo {
  int key_tiles;      // steps; 0: there is no more work
  int rows;           // of the tile that exist
  int first_position; // of row 0's token among the keys
  int last_key;       // of the sequence
  int batch, token;   // of row 0, as coordinates of out
  int head;           // of row 0
  int skips;          // Loading::kAscending: whether the sequence has rows enough to skip
};

enum class KeyMode : int {
  kPlain = 0,  // every row sees every key
  kMasked = 1, // the positions decide
  kMeans = 2,  // columns are block means, of which `wanted` are corrected for
  kListed = 3, // of the columns `wanted` are there, and every row sees those
  kNear = 4    // of the columns `wanted` are there, and the positions decide
};

// A key tile: the meaning of its columns. Sixteen consecutive columns always lie together.
struct alignas(64) KeyTile {
  KeyMode mode;
  float short_bias;   // kMeans: is added to the score of this
  int short_column;   // column, a block that is shorter than the others; -1: there is none
  int position[8];    // kMasked, kNear: of columns 16 i
  uint32_t wanted[4]; // [l]: bits of columns 8 i + 2 l and the next, for all i: those that lane l of four holds

  // Loading::kGather, which has no means: the second half's columns are described by a warp of its own.
  __device__ __forceinline__ void SetSecondMode(KeyMode its) { short_column = static_cast<int>(its); }
  __device__ __forceinline__ KeyMode ModeOfBoth() const {
    return static_cast<KeyMode>(max(static_cast<int>(mode), short_column));
  }
};

template <class SHAPE>
struct SharedMemory {
  static constexpr int kPanelRowsBytes = 128; // bytes of a row in a panel
  static constexpr int kQPanelBytes = kTileRowsSm90 * kPanelRowsBytes;
  static constexpr int kQBytes = SHAPE::kPanels * kQPanelBytes;
  static constexpr int kKeyPanelBytes = SHAPE::kKeys * kPanelRowsBytes;
  static constexpr int kKeyBytes = SHAPE::kPanels * kKeyPanelBytes;
  // Twice the stages: described before its stage is free, a tile overwrites one that all have done with.
  static constexpr int kKeyTiles = 2 * SHAPE::kStages;
  static_assert(kKeyTiles >= SHAPE::kStages + 2, "the math side reads a description until the next step's scores");
  static_assert((kKeyTiles & (kKeyTiles - 1)) == 0, "positions wrap around by a mask");
  static constexpr int kOutWarpBytes = 16 * SHAPE::kOutColumns * 2;

  uint8_t q[SHAPE::kQStages][kQBytes]; // 1024-byte aligned, as all panels must be
  uint8_t k[SHAPE::kStages][kKeyBytes];
  uint8_t v[SHAPE::kStages][kKeyBytes];
  uint8_t out[kMathThreads / 32][kOutWarpBytes]; // a warp's 16 rows on their way out
  KeyTile key_tiles[kKeyTiles];
  TileInfo tiles[SHAPE::kQStages];
  uint64_t q_full[SHAPE::kQStages], q_empty[SHAPE::kQStages];
  uint64_t k_full[SHAPE::kStages], k_empty[SHAPE::kStages];
  uint64_t v_full[SHAPE::kStages], v_empty[SHAPE::kStages];
  alignas(16) uint32_t row_offsets[4][64]; // of the rows that a producer warp copies
  Work work;                               // the next tile, from the warp that takes tiles to those that load them,
  uint64_t words[32];                      // and the highest words of its mask
  uint64_t work_full, work_empty;
  int next_item, next_parity, tiles_of_batch; // of the warp that takes tiles
  float never_written;                        // HoldBack's
};

// Of Loading::kGather.
template <class SHAPE>
struct GatherMemory : SharedMemory<SHAPE> {
  TileList list;
};

// What a query tile has skipped: pairs of a row and a key, and in the highest bits how many warps have added theirs.
struct TileSkipped {
  TileInfo info; // again, for the end of the tile: no register holds it till then
  int64_t mask_row;
  unsigned long long pairs;
};

// Of Loading::kAscending.
template <class SHAPE>
struct SkipMemory : SharedMemory<SHAPE> {
  // By tile, in turns. Four: warpgroups may be a tile apart, and the loading side two further.
  TileSkipped skipped[4];
  // Of each warpgroup and V stage: whether its warps have decided on the step, and whether one of them counts it.
  uint64_t decided[2][SHAPE::kStages];
  alignas(4) uint8_t counts[2][SHAPE::kStages][4];
};

// Named barriers; 0 is __syncthreads.
constexpr int kTurnBarrier = 1; // and 2: whose turn it is to use the matrix units, a math warpgroup each

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_SHARED_MEMORY_CUH_
