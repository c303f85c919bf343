// What the rest of the CUDA backend sees of the attend kernel: one struct of arguments, a question of what it can't do,
// its scratch size, and the launch. Plain C++, so that host code includes it without nvcc's device headers.
#ifndef FLASHPREFILL_CUDA_ATTEND_H_
#define FLASHPREFILL_CUDA_ATTEND_H_

#include <cuda_runtime_api.h>

#include "core/types.h"

namespace flashprefill::cuda {

// The arguments are those of fp_attend, checked by core/validate.cc; every array they name is device memory.
struct AttendArgs {
  const Problem* problem;
  const BlockMask* mask; // its geometry; bits == nullptr: every block is kept, and nothing is read
  const Output* output;
  // For mask->mean_correction: the means of the blocks of K and of V, each [kv_heads, MeanRows, head_dim], contiguous,
  // in the inputs' dtype, 16-byte aligned. Block j of sequence b is row MeanBase + j; other rows are not read into
  // products.
  const void* k_means = nullptr;
  const void* v_means = nullptr;
  void* scratch = nullptr; // AttendScratchBytes of it, 64-byte aligned; contents don't matter, except:
  // The launch before this one on the stream is one of LaunchSelect's, which has set the scratch memory's first word to
  // zero. Else a kernel that does so comes first. The kernel's start hides behind the end of either.
  bool follows_select = false;
};

// Rows of the means of one KV head, from what the host knows.
inline int64_t MeanRows(const Problem& p, int block_size) {
  if (p.cu_seqlens_k && !p.block_table) return p.total_k / block_size + p.batch;
  return p.batch * DivUp<int64_t>(p.max_seqlen_k, block_size);
}

// Row of the first block of sequence b, whose first packed key is k_begin (not read for the other layouts). As with
// fp_tile_base, one spare row a sequence makes prefix sums unnecessary.
#ifdef __CUDACC__
__host__ __device__
#endif
    inline int64_t
    MeanBase(bool packed_k, int64_t b, int64_t k_begin, int64_t max_seqlen_k, int block_size) {
  return packed_k ? k_begin / block_size + b : b * ((max_seqlen_k + block_size - 1) / block_size);
}

// Null if LaunchAttend does this problem, else what it would need, in words ("head_dim is 20; ... a multiple of 8").
// Strides of q, k, v and out: 1 for head_dim, multiples of 8 elements and >= 0 for the rest; pointers 16-byte aligned.
const char* AttendUnsupported(const Problem& problem, const BlockMask& mask, const Output* output);

size_t AttendScratchBytes();

// Puts the kernel on the stream. No allocation, no synchronisation; may be captured in a graph, where the device
// arrays' contents (lengths, page tables, masks) may change between replays.
cudaError_t LaunchAttend(const AttendArgs& args, cudaStream_t stream);

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_ATTEND_H_
