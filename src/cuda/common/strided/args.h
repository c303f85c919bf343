// Strided selection, XAttention's and RRAttention's: the arguments of its three kernels, and their launches. Plain C++.
// cells.cuh has the geometry on the device, docs/hopper-select.md the schedule.
#ifndef FLASHPREFILL_CUDA_COMMON_STRIDED_ARGS_H_
#define FLASHPREFILL_CUDA_COMMON_STRIDED_ARGS_H_

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "cuda/common/sequence.cuh"
#include "cuda/devices.h"

namespace flashprefill::cuda {

constexpr int kStripRows = 128;         // rows of the grid that a CTA scores at once
constexpr int kStridedPanel = 64;       // columns of a bulk copy: 128 bytes per row
constexpr int kKeyTileCells = 256;      // key cells that it scores them against
constexpr int kMaxHeadThresholds = 512; // heads that may have a threshold each: they travel as a kernel argument

// A tile of a query head is a *unit*, of 128 / stride rows. Units go tile by tile, the heads of a KV head next to each
// other; a *strip* is `stride` units, 128 rows. A *key tile* is whole blocks, at most 256 cells.
//
// Tiles are selected for in *chunks* of consecutive rows of the mask, so that the arrays between the kernels stay
// small:
//   q_rows  [kv_heads, q_tiles, heads of a KV head, rows per unit, pitch]
//   sums    [kv_heads, tiles, heads of a KV head, rows per unit, key_tiles, block_pitch]: of a row's powers of two, by
//           block, relative to the largest of the row in that key tile
//   stats   the same without the last axis: that largest exponent, and the sum over the key tile
struct StridedShape {
  int stride, log2_stride;
  int rows_per_unit, log2_rows;
  bool means;    // RRAttention: key cells are means and rows single queries, else both are whole cells
  int columns;   // of a cell
  int pitch;     // columns rounded up to 8 elements
  int box_units; // units that one bulk copy brings
  // Hopper's copy engine reads rows of whole tiles from q itself, and whole key tiles from k. Copied then is only the
  // last one of each sequence, if it is short: q_rows a tile for each sequence, k_cells a key tile for each.
  bool direct_q, direct_k;
  int cells_per_block, key_tile_blocks, key_tile_cells, block_pitch;
  int key_tiles;     // of the longest sequence
  int64_t cell_rows; // of a KV head in k_cells; unless direct_k a sequence's begin at MeanBase for blocks of `stride`
  int64_t q_tiles;
};

struct StridedArgs {
  DeviceProblem d;
  TileRules rules;
  StridedShape shape;
  int first_tile, tiles; // rows of the mask that this chunk covers, of each head
  void *k_cells, *q_rows;
  __half* sums;
  float2* stats;
};

// Copies cells of keys and rows of queries to where the score kernel can read them as two matrices: in the first chunk
// keys, and queries where they must be copied.
cudaError_t LaunchStridedGather(const StridedArgs& args, bool keys, bool queries, cudaStream_t stream);

struct StridedScoreArgs {
  StridedArgs common;
  float exponent_scale; // turns a product into an exponent of two
};

cudaError_t LaunchStridedScoreSm90(const StridedScoreArgs& args, cudaStream_t stream);
cudaError_t LaunchStridedScorePortable(const StridedScoreArgs& args, const Gpu& gpu, cudaStream_t stream);

struct StridedKeepArgs {
  StridedArgs common;
  bool forced_first; // forced blocks count towards the share
  uint64_t* bits;
  int32_t *counts, *fallback; // or null
  int* attend_counter;        // set to zero for an attend that follows, or null
  int64_t words;
  float threshold;
  bool by_head; // head_threshold in place of threshold
  float head_threshold[kMaxHeadThresholds];
};

// Whether the masses of a tile of this many blocks fit in shared memory.
bool StridedKeeps(const Gpu& gpu, int64_t max_blocks);

cudaError_t LaunchStridedKeep(const StridedKeepArgs& args, const Gpu& gpu, cudaStream_t stream);

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_STRIDED_ARGS_H_
