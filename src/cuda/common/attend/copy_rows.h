// K and V of a cache in small pages, copied one after another so that attention can fetch them by bulk copies: once per
// call, where rows would be gathered at every visit of a block. Plain C++.
#ifndef FLASHPREFILL_CUDA_COMMON_ATTEND_COPY_ROWS_H_
#define FLASHPREFILL_CUDA_COMMON_ATTEND_COPY_ROWS_H_

#include <cuda_runtime_api.h>

#include "core/backend.h"

namespace flashprefill::cuda {

struct AttendArgs;

// Visits of a block from which a copy pays. Derived: copying a block takes 6,200 cycles of a multiprocessor, and a
// visit of one that lies in pages of 1 takes 840 more than of one that lies together.
constexpr int64_t kCopyFromVisits = 8;

// Keys per page below which Hopper's kernel reads rows, and not chunks by bulk copies.
constexpr int kBulkPageKeys = 16;

// The same where a mask skips, whose kernel reads no rows, and has one warp each for the copies of K and V.
constexpr int kSkipPageKeys = 64;

struct KeyCopy {
  uint16_t *k = nullptr, *v = nullptr; // [batch, max_seqlen_k, kv_heads, head_dim]
  int32_t* lengths = nullptr;          // [batch]

  static KeyCopy Take(Workspace& workspace, const Problem& p) {
    const int64_t elements = p.batch * p.max_seqlen_k * p.kv_heads * p.head_dim;
    KeyCopy copy;
    copy.k = workspace.Take<uint16_t>(elements);
    copy.v = workspace.Take<uint16_t>(elements);
    copy.lengths = workspace.Take<int32_t>(p.batch);
    return copy;
  }

  // The problem over the copies instead of the pages.
  Problem Copied(Problem p) const {
    p.block_table = nullptr;
    p.page_size = p.pages_per_seq = 0;
    p.page_count = 0;
    p.cu_seqlens_k = nullptr;
    p.seqused_k = lengths;
    const int64_t row = int64_t{p.kv_heads} * p.head_dim;
    for (Tensor* t : {&p.k, &p.v}) {
      t->stride[0] = p.max_seqlen_k * row;
      t->stride[1] = row;
      t->stride[2] = p.head_dim;
      t->stride[3] = 1;
    }
    p.k.data = k;
    p.v.data = v;
    return p;
  }
};

// Copies what is there of each sequence, and its length. Rows past a sequence's end are left as they are.
cudaError_t LaunchCopyRows(const AttendArgs& args, const KeyCopy& copy, cudaStream_t stream);

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ATTEND_COPY_ROWS_H_
