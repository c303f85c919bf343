// The score kernels: their arguments and their launches. Plain C++.
#ifndef FLASHPREFILL_CUDA_COMMON_ENERGIES_SCORE_H_
#define FLASHPREFILL_CUDA_COMMON_ENERGIES_SCORE_H_

#include <cuda_runtime_api.h>

#include "cuda/common/energies/keep.h"
#include "cuda/common/sequence.cuh"
#include "cuda/devices.h"

namespace flashprefill::cuda {

constexpr int kStepBlocks = 64; // key blocks per step

// A *unit* is one tile of one mask head. A KV head's units of a sequence are counted tile by tile, the tile's mask
// heads next to each other, as LaunchPool lays out pooled rows.
struct ScoreArgs {
  DeviceProblem d;
  TileRules rules;
  KeepRule keep;
  float exponent_scale; // softmax_scale * log2(e)
  int query_pool;
  int rows_per_head; // pooled rows of a head in a whole tile
  int unit_rows;     // rows that a unit has room for: 8, 32 or 128; Hopper's Sketch also has 2 and 4
  bool rows_in_q;    // query_pool is 1 and rows come from q itself; else from pooled rows, where unit_rows is 128
  bool rows_aligned; // 16 bytes of a row of q may be loaded at once
  bool sketch;
  int outliers;       // Sketch's planes besides mean and variance
  float square_scale; // of the squares of its rows
  int64_t mean_rows;  // of a KV head in a plane of key data
  int64_t unit_count; // of pooled rows' units, all KV heads together: where their squares begin
  const void* keys;   // [planes, kv_heads, mean_rows, pitch]: means, or Sketch's planes
  const void* rows;   // pooled rows, as LaunchPool lays them out, or null
  int pitch;
  uint64_t* bits;
  int32_t* counts; // or null
  int64_t words;
};

// Null if the kernel does a problem of this shape on that GPU, else the requirement that is not met, in words.
const char* ScoreUnsupported(const Gpu& gpu, int head_dim, int64_t max_blocks, int unit_rows, bool sketch);

cudaError_t LaunchScore(const ScoreArgs& args, const Gpu& gpu, cudaStream_t stream);

// The two families of kernels. Fits: whether there is a plan.
bool ScoreFitsSm90(int head_dim, int64_t max_blocks, int unit_rows, bool sketch);
cudaError_t LaunchScoreSm90(const ScoreArgs& args, cudaStream_t stream);
bool ScoreFitsPortable(const Gpu& gpu, int head_dim, int64_t max_blocks, int unit_rows, bool sketch);
cudaError_t LaunchScorePortable(const ScoreArgs& args, const Gpu& gpu, cudaStream_t stream);

// Columns of the product that four warps make: 16 units of 2 rows, or 8 of 4 or 8.
inline int ScoreColumns(int unit_rows) { return unit_rows == 128 ? 128 : unit_rows < 8 ? 32 : 64; }

// Energies from unit to unit beyond a multiple of 64: the units that a warp stores together then fall on different
// banks, be they floats or of 16 bits.
inline int EnergyPad(int unit_rows) { return unit_rows == 4 ? 16 : unit_rows == 2 ? 8 : 4; }

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ENERGIES_SCORE_H_
