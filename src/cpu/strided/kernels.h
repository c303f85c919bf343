// The arithmetic of policies that score rows of queries against cells of keys and need the softmax of each row by
// block: XAttention and RRAttention, and with cells of a single key SampleAttention. One table for each instruction
// set.
//
// Rows lie side by side in the lanes of a *panel*, [depth][kStridedLanes], and cells of keys come by as they are in the
// cache, [cell][depth]: keys are not transposed and not kept, and the largest score and the sum of powers of two of a
// block are vectors over rows, with nothing to be reduced across lanes.
#ifndef FLASHPREFILL_CPU_STRIDED_KERNELS_H_
#define FLASHPREFILL_CPU_STRIDED_KERNELS_H_

#include "core/types.h"

namespace flashprefill::cpu {

constexpr int kStridedLanes = 32;

struct StridedKernels {
  // rows [end - begin][head_dim] = keys of one KV head.
  void (*load_keys)(const Problem& p, const Sequence& s, int head, int64_t begin, int64_t end, float* rows);
  // cells [count][head_dim] = means, rounded to K's dtype, of `stride` keys each from key `begin` on; the last cell may
  // hold fewer.
  void (*mean_keys)(const Problem& p, const Sequence& s, int head, int stride, int64_t begin, int64_t count,
                    float* cells);
  // row [head_dim] = factor * the query.
  void (*load_query)(const Problem& p, const Sequence& s, int64_t i, int head, float factor, float* row);
  // Adds the powers of two of the products of a panel with cells [first, first + n), which lie `pitch` floats apart,
  // into the sums of their block, which are relative to 2^largest. Both are [kStridedLanes]. Lane r sees the cells
  // below visible[r].
  void (*score)(const float* panel, const float* cells, int64_t pitch, int64_t depth, int64_t first, int n,
                const float* visible, float* largest, float* sums);
  // Makes the sums [blocks][kStridedLanes] shares: those of a lane add up to one, or are zero.
  void (*normalise)(int64_t blocks, const float* largest, float* sums);
};

const StridedKernels& StridedKernelsFor(const Exec& exec);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_STRIDED_KERNELS_H_
