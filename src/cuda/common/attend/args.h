// Arguments of attend that all kernels share: device arrays, strides, and the numbers that the order of tiles and the
// walk over keys need.
#ifndef FLASHPREFILL_CUDA_COMMON_ATTEND_ARGS_H_
#define FLASHPREFILL_CUDA_COMMON_ATTEND_ARGS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/sequence.cuh"

namespace flashprefill::cuda {

constexpr int kPanelColumns = 64; // of a panel: 16-bit values in one 128-byte swizzle row

struct AttendArgs {
  const void *k_data, *v_data;
  const void *k_mean_data, *v_mean_data; // [kv_heads, mean_rows, head_dim]; only with mean_correction
  int64_t k_stride[3], v_stride[3];      // batch or page, token, head; in elements
  int64_t mean_stride[3];
  uint32_t k_units[2], v_units[2]; // of those the first two in 16 bytes, for row by row
  int64_t out_stride[3];           // batch (0 if packed), token, head
  int64_t lse_stride[3];           // batch (0 if packed), head, token
  void* out;
  float* lse; // may be null
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *seqused_k, *block_table;
  const uint64_t* bits; // null: all ones
  const int* order;     // which item is taken as the n-th
  int* counter;         // of tiles handed out; 0 at launch
  int64_t block_table_stride;
  int64_t tile_rows;
  int64_t mean_rows;
  int words; // a mask row
  int batch;
  int kv_heads;
  int section_heads;  // KV heads that are worked on together; divides kv_heads
  int group;          // query heads per KV head
  int heads_per_tile; // group or 1
  int mask_heads;     // of a KV head: group / heads_per_tile
  int ordered_items;  // that `order` has; the others are taken as they come
  int token_of_row;   // ceil(65536 / heads_per_tile)
  int tile_tokens;
  int head_dim;
  int block_size;
  int chunk_shift; // log2 of the keys that lie together: the largest power of 2 in block and page, at most kKeys
  // Division by numbers that the host knows: a lone warp takes some 200 cycles for each otherwise.
  Divider by_tile, by_block, by_in_tile, by_mask_heads; // tile_tokens, block_size, mask heads a section, a KV head
  Divider by_tiles;                                     // tiles of a sequence, where all have max_q queries
  Divider by_page;                                      // page_size
  int page_size;                                        // 0: not paged
  int page_count, pages_per_seq;
  int causal;
  int mean_correction;
  int mean_rows_each; // rows of means a sequence, unless K is packed
  int total_q, total_k;
  int max_q, max_k;
  float exponent_scale; // softmax_scale * log2(e)
  // A block's mean stands for block_size keys: log2 of that, in exponents and in units of raw scores.
  float mean_bias_log2, mean_bias;
};

// The key lists of a mask, as fp_block_mask has them.
struct ListArgs {
  const int32_t* lists; // [mask heads, segment_rows, stride]: the number of keys, of those wanted, the keys; or null
  int64_t segment_rows, stride;
  int max_keys;
  Divider by_segment_tokens, by_segment_tiles;

  static ListArgs Of(const BlockMask& mask);
};

// Sets the counter of tiles handed out to 0 by a kernel that lets the next one start.
cudaError_t LaunchAttendStart(int* counter, cudaStream_t stream);

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ATTEND_ARGS_H_
