// Sizes, arguments and shared memory of the 8-bit attend kernel. The parts that it shares with the bf16 kernel have the
// same names, so that tile_scheduler.cuh, loading_side.cuh and math_side.cuh serve both.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_SHARED_MEMORY_CUH_
#define FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_SHARED_MEMORY_CUH_

#include "cuda/sm90/attend/shared_memory.cuh"
#include "cuda/sm90/attend_8bit/params.h"

namespace flashprefill::cuda {

// A key tile, and what its integers are worth.
struct alignas(128) ScaledKeyTile : KeyTile {
  uint32_t not_finite[4]; // kMeans: columns whose score is to be NaN, as `wanted`,
  int any_not_finite;     // and whether there is one
  ImageScale k, v;        // as they come, each with its image
};

// What a thread of the math side has of its two rows, in shared memory, since registers are what it has none of: what
// one of a row's integers times one of a key with the scale 1 is worth in an exponent of two, what exponents are taken
// against, and its part of the sums. One address leads to all of it.
struct RowStates {
  float2 scale[kMathThreads];
  float2 reference[kMathThreads];
  float2 sum[kMathThreads];
};

template <class SHAPE>
struct SharedMemory8 {
  static constexpr int kPanelRowsBytes = 128;
  static constexpr int kQPanelBytes = kTileRowsSm90 * kPanelRowsBytes;
  static constexpr int kQBytes = SHAPE::kPanels * kQPanelBytes;
  static constexpr int kKeyTiles = 2 * SHAPE::kStages;
  static_assert(kKeyTiles >= SHAPE::kStages + 3, "V's scale is read a step later than K's");
  static_assert((kKeyTiles & (kKeyTiles - 1)) == 0, "positions wrap around by a mask");
  static constexpr int kTiles = 4; // a tile's is read until its O is stored, when the next but one may be announced
  static constexpr int kOutWarpBytes = 16 * SHAPE::kOutColumns * 2;

  uint8_t q[1][kQBytes]; // as it comes, in 16 bits
  uint8_t q8[kTileRowsSm90 * kImageColumns];
  uint8_t k[SHAPE::kStages][kImageBytes];
  uint8_t v[SHAPE::kStages][kImageBytes];
  uint8_t out[kMathThreads / 32][kOutWarpBytes];
  ScaledKeyTile key_tiles[kKeyTiles];
  alignas(16) float center[kImageColumns]; // of the tile whose Q is in q
  TileInfo tiles[kTiles];
  RowStates rows;
  float lse_shift[2][kTileRowsSm90]; // q * center of this tile and the next, scaled
  uint64_t q_full[1], q_empty[1];
  uint64_t k_full[SHAPE::kStages], k_empty[SHAPE::kStages];
  uint64_t v_full[SHAPE::kStages], v_empty[SHAPE::kStages];
  Work work;
  uint64_t words[32];
  uint64_t work_full, work_empty;
  int next_item, next_parity, tiles_of_batch;
  float never_written;
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_SHARED_MEMORY_CUH_
