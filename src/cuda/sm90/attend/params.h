// Arguments of the attend kernel: tensor maps made on the host, device arrays, and the numbers that both sides
// must agree on. Sizes that depend on the head dimension are AttendShape, so that host and device share them.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_PARAMS_H_
#define FLASHPREFILL_CUDA_SM90_ATTEND_PARAMS_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/sequence.cuh"

namespace flashprefill::cuda {

constexpr int kPanelColumns = 64; // of a panel: 16-bit values in one 128-byte swizzle row
constexpr int kTileRowsSm90 = 128;
constexpr int kMeanPartRows = 16;
constexpr int kMathThreads = 256;
constexpr int kAttendThreads = 384;

// How K and V come, and by how many warps each.
enum class Loading {
  kTiles,  // one: a bulk copy or two bring a key tile
  kChunks, // two, which share a tile's many bulk copies
  kRows    // two, by asynchronous copies: from pages of less than 16 rows
};

// Tile sizes by padded head dimension. 227 KiB of shared memory must hold the Q stages, the K/V stages and 32 KiB (d64:
// 16) for O: d128: 2 * 32 + 2 * 64 + 32 = 224.
template <int HEAD_DIM>
struct AttendShape {
  static_assert(HEAD_DIM == 64 || HEAD_DIM == 128 || HEAD_DIM == 256, "other head dimensions are padded to these");
  static constexpr int kHeadDim = HEAD_DIM;
  static constexpr int kPanels = HEAD_DIM / kPanelColumns;
  static constexpr int kKeys = HEAD_DIM == 256 ? 64 : 128; // keys per step: S and O must share the 224 registers
  static constexpr int kStages = HEAD_DIM == 64 ? 4 : 2;   // K tiles, and V tiles, in flight; steps of d64 are shorter
  static constexpr int kQStages = HEAD_DIM == 256 ? 1 : 2; // 2: the next tile's Q is there before this one is done
  // Products of P V that are still to be issued when the turn is passed. d64's are so short that it does harm.
  static constexpr int kEarlyTurn = HEAD_DIM == 64 ? 0 : HEAD_DIM == 128 ? 2 : 1;
  static constexpr int kOutColumns = HEAD_DIM < 128 ? HEAD_DIM : 128; // of O staged at a time
  // The kernel starts with 168 registers per thread, 384 * 168 = 64,512; the producer's 128 threads give some to the
  // 256.
  static constexpr int kProducerRegisters = HEAD_DIM == 256 ? 56 : 88;
  static constexpr int kMathRegisters = HEAD_DIM == 256 ? 224 : 208;
  static_assert(128 * kProducerRegisters + 256 * kMathRegisters == 64512, "all registers are used");
};

struct AttendParams {
  CUtensorMap q, k, v;              // (head_dim, heads, tokens, batch or page)
  CUtensorMap out_map;              // of a warp's 16 rows, as q; only with bulk_out
  CUtensorMap k_mean, v_mean;       // (head_dim, rows, kv_heads, 1); only with mean_correction
  CUtensorMap v_mean_part;          // v_mean in boxes of kMeanPartRows
  const void *k_data, *v_data;      // for rows that bulk copies can't fetch
  const void* v_mean_data;          // [kv_heads, mean_rows, head_dim]
  int64_t k_stride[3], v_stride[3]; // batch or page, token, head; in elements
  int64_t mean_stride[3];
  uint32_t k_units[2], v_units[2]; // of those the first two in 16 bytes, for row by row
  int64_t out_stride[3];           // batch (0 if packed), token, head
  int64_t lse_stride[3];           // batch (0 if packed), head, token
  void* out;
  float* lse; // may be null
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *seqused_k, *block_table;
  const uint64_t* bits; // null: all ones
  int* counter;         // of tiles handed out; 0 at launch
  const int* order;     // which item is taken as the n-th
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
  int absent_token;                                     // a token coordinate outside of K and V: reads as zeros
  int page_size;                                        // 0: not paged
  int page_count, pages_per_seq;
  int causal;
  int mean_correction;
  int mean_rows_each; // rows of means a sequence, unless K is packed
  int total_q, total_k;
  int max_q, max_k;
  int bulk_out;         // 16 rows of a tile are whole tokens
  float exponent_scale; // softmax_scale * log2(e)
  // A block's mean stands for block_size keys: log2 of that, in exponents and in units of raw scores.
  float mean_bias_log2, mean_bias;
  uint32_t zero;   // OpaqueCopy's
  float minus_one; // HoldBack's
};

// The kernels for a dtype and a head dimension, to be launched with AttendParams.
using AttendKernel = void (*)(AttendParams);
struct AttendKernelSet {
  AttendKernel tiles, chunks, rows; // by Loading
  int shared_bytes;
};
template <class T, int HEAD_DIM>
AttendKernelSet AttendKernels();

// Sets the counter to 0 by a kernel that lets the next one start.
cudaError_t LaunchAttendStart(int* counter, cudaStream_t stream);

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_PARAMS_H_
