// K and V copied once per call, one after another in 16 bits, because kernels want them so: out of pages that are too
// small for bulk copies, where rows would be gathered at every visit of a block; or out of an FP8 cache of any layout,
// whose numbers are multiplied by their scales on the way. Plain C++.
#ifndef FLASHPREFILL_CUDA_COMMON_KEYS_KEY_COPY_H_
#define FLASHPREFILL_CUDA_COMMON_KEYS_KEY_COPY_H_

#include <cuda_runtime_api.h>

#include "core/backend.h"
#include "cuda/common/means.h"

namespace flashprefill::cuda {

// Visits of a block from which a copy out of small pages pays. Derived: copying a block takes 6,200 cycles of a
// multiprocessor, and a visit of one that lies in pages of 1 takes 840 more than of one that lies together.
constexpr int64_t kCopyFromVisits = 8;

// Keys per page below which Hopper's kernel reads rows, and not chunks by bulk copies.
constexpr int kBulkPageKeys = 16;

// The same where a mask skips, whose kernel reads no rows, and has one warp each for the copies of K and V.
constexpr int kSkipPageKeys = 64;

inline bool HasFp8(const Problem& p) { return p.k.dtype == FP_E4M3 || p.v.dtype == FP_E4M3; }

// Whether the pass can read rows eight values at a time.
inline bool ReadsEightAtOnce(const Tensor& t) {
  bool can = reinterpret_cast<uintptr_t>(t.data) % (8 * DtypeSize(t.dtype)) == 0 && t.stride[3] == 1;
  for (int axis = 0; axis < 3; ++axis) can &= t.stride[axis] % 8 == 0;
  return can;
}

// Null if the pass can read an FP8 problem's K and V, else the requirement that is not met, in words.
inline const char* UnsupportedFp8(const Problem& p) {
  if (p.head_dim % 8 != 0) return "head_dim must be a multiple of 8 with FP8 keys or values on CUDA";
  for (const Tensor* t : {&p.k, &p.v}) {
    if (!ReadsEightAtOnce(*t)) {
      return "k and v in FP8 must be 8-byte aligned on CUDA, with head_dim stride 1 and the other strides multiples of "
             "8";
    }
  }
  return nullptr;
}

struct KeyCopy {
  uint16_t *k = nullptr, *v = nullptr; // in q's dtype: [batch, max_seqlen_k, kv_heads, head_dim]; [total_k, kv_heads,
                                       // head_dim] of packed keys, which stay so
  int32_t* lengths = nullptr;          // [batch]; where the keys are in pages, else null
  float* one = nullptr;                // the scale of FP8 values that have none

  // of_v: V too; else it is not read, and K stands in its place.
  static KeyCopy Take(Workspace& workspace, const Problem& p, bool of_v) {
    const int64_t rows = PackedKeys(p) ? p.total_k : p.batch * p.max_seqlen_k;
    const int64_t elements = rows * p.kv_heads * p.head_dim;
    KeyCopy copy;
    copy.k = workspace.Take<uint16_t>(elements);
    if (of_v) copy.v = workspace.Take<uint16_t>(elements);
    if (p.block_table) copy.lengths = workspace.Take<int32_t>(p.batch);
    if (of_v && p.v.dtype == FP_E4M3 && !p.v_scale) copy.one = workspace.Take<float>(1);
    return copy;
  }

  // The problem over the copies. v_scale stays where V was FP8, though V has it now: 8-bit images that have such a
  // scale again hold the cache's own numbers.
  Problem Over(Problem p) const {
    const bool packed = PackedKeys(p);
    if (p.block_table) {
      p.block_table = nullptr;
      p.page_size = p.pages_per_seq = 0;
      p.page_count = 0;
      p.cu_seqlens_k = nullptr;
      p.seqused_k = lengths;
    }
    p.k_scale = nullptr;
    if (p.v.dtype != FP_E4M3) p.v_scale = nullptr;
    if (one) {
      p.v_scale = one;
      p.v_scale_stride[0] = p.v_scale_stride[1] = 0;
    }
    const int64_t row = int64_t{p.kv_heads} * p.head_dim;
    for (Tensor* t : {&p.k, &p.v}) {
      t->dtype = p.q.dtype;
      t->stride[0] = packed ? 0 : p.max_seqlen_k * row;
      t->stride[1] = row;
      t->stride[2] = p.head_dim;
      t->stride[3] = 1;
    }
    p.k.data = k;
    p.v.data = v ? v : k;
    return p;
  }
};

// Copies what is there of each sequence, and its length: -1 for one that its pages have no room for. Rows past a
// sequence's end are left as they are. q's dtype is bf16 or fp16; that of k and of v the same or FP8.
cudaError_t LaunchKeyCopy(const Problem& p, const KeyCopy& copy, cudaStream_t stream);

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_KEYS_KEY_COPY_H_
