// Means of key blocks in device memory: [kv_heads, MeanRows, pitch], in the inputs' dtype. Block j of sequence b is row
// MeanBase + j. Plain C++ and device code.
#ifndef FLASHPREFILL_CUDA_COMMON_MEANS_H_
#define FLASHPREFILL_CUDA_COMMON_MEANS_H_

#include "core/types.h"

#ifdef __CUDACC__
#define FLASHPREFILL_HOST_DEVICE __host__ __device__
#else
#define FLASHPREFILL_HOST_DEVICE
#endif

namespace flashprefill::cuda {

// Whether the keys of a batch lie one sequence after another, without pages.
FLASHPREFILL_HOST_DEVICE inline bool PackedKeys(const Problem& p) { return p.cu_seqlens_k && !p.block_table; }

// Rows of the means of one KV head, from the host's bounds.
inline int64_t MeanRows(const Problem& p, int block_size) {
  if (PackedKeys(p)) return p.total_k / block_size + p.batch;
  return p.batch * DivUp<int64_t>(p.max_seqlen_k, block_size);
}

// Row of the first block of sequence b, whose first packed key is k_begin (not read for the other layouts). One spare
// row per sequence makes prefix sums unnecessary.
FLASHPREFILL_HOST_DEVICE inline int64_t MeanBase(bool packed_k, int64_t b, int64_t k_begin, int64_t max_seqlen_k,
                                                 int block_size) {
  return packed_k ? k_begin / block_size + b : b * ((max_seqlen_k + block_size - 1) / block_size);
}

// Elements of a row: head_dim rounded up, so that each begins at a multiple of 16 bytes.
inline int MeanPitch(const Problem& p) { return DivUp(p.head_dim, 8) * 8; }

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_MEANS_H_
