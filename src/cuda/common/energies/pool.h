// The pooling pass: its arguments and its launch. Plain C++.
#ifndef FLASHPREFILL_CUDA_COMMON_ENERGIES_POOL_H_
#define FLASHPREFILL_CUDA_COMMON_ENERGIES_POOL_H_

#include <cuda_runtime_api.h>

#include "cuda/common/sequence.cuh"

namespace flashprefill::cuda {

constexpr int kMaxOutliers = 16;
constexpr int kMetricParts = 16; // sums that make a metric

// Everything that one pooling pass reads and writes. Pointers that are null are not wanted.
//   means  [kv_heads, mean_rows, pitch]: block j of sequence b is row MeanBase(b) + j (common/means.h); of K also
//   before
//          they are rounded
//   planes of Sketch, each of that shape, one after another: mean and variance of the keys that are no outliers, then
//          the outliers, the farthest first
//   metric [batch, kv_heads, kMetricParts, pitch]: added up over parts, the weight of each dimension in distances
//   q rows [kv_heads, tile_rows, units_per_kv, unit_rows, pitch]: the pooled rows of a tile of a mask head lie
//          together, heads fastest; rows without a token are not written. Squares follow as a second array of that
//          shape
struct PoolArgs {
  static PoolArgs Of(const DeviceProblem& d, const TileRules& rules) {
    PoolArgs a{};
    a.d = d;
    a.rules = rules;
    a.mean_rows = MeanRows(d.p, rules.block_size);
    a.pitch = MeanPitch(d.p);
    a.query_pool = 1;
    return a;
  }

  DeviceProblem d;
  TileRules rules;
  int64_t mean_rows; // MeanRows of common/means.h
  int pitch;         // head_dim rounded up to 8 elements
  void* k_means;
  void* v_means;
  float* k_floats; // means of K, not rounded
  void* sketch;    // planes of Sketch
  int outliers;    // Sketch's, 0 .. kMaxOutliers
  float* metric;   // or null: every dimension counts 1
  void* q_rows;    // pooled rows of q
  int query_pool;  // tokens per row
  int unit_rows;   // rows that a tile of a mask head has room for
  bool squares;    // also q^2 * square_scale, rounded
  float square_scale;
  bool skip_forced;    // sequences in which everything is forced need no means
  int32_t* fallback;   // [batch]
  int* attend_counter; // set to zero for an attend that follows, or null
};

// Null if the pass does this head dimension, else the requirement that is not met, in words.
const char* PoolUnsupported(int head_dim);

// Fills args.metric. Aligned: rows of q can be read 16 bytes at a time. At most 65,535 sequences.
cudaError_t LaunchMetric(const PoolArgs& args, bool aligned, cudaStream_t stream);

// One launch, on the stream. q, k and v have 16-bit dtypes, k and q the same one.
cudaError_t LaunchPool(const PoolArgs& args, cudaStream_t stream);

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ENERGIES_POOL_H_
