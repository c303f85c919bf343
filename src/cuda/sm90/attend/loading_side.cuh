// What the producers of the attend kernels share, bf16's (producer.cuh) and 8 bits' (../attend_8bit/producer.cuh): a
// tile is announced together with its Q, and a tile of means says which of its columns count.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_LOADING_SIDE_CUH_
#define FLASHPREFILL_CUDA_SM90_ATTEND_LOADING_SIDE_CUH_

#include "cuda/sm90/attend/key_iterator.cuh"

namespace flashprefill::cuda {

// A tile of `steps` key tiles, as the math side is told of it.
__device__ __forceinline__ TileInfo InfoOf(const AttendArgs& p, const Work& work, int steps) {
  return {steps,
          work.tokens * p.heads_per_tile,
          work.first_position,
          work.k_len - 1,
          p.cu_seqlens_q ? 0 : work.sequence,
          work.q_begin + work.begin,
          work.head,
          0};
}

// Starts the copies of a tile's Q into a stage that is free. The barrier waits for `more` bytes besides, which are the
// caller's to send. By one lane.
template <class SHAPE, class Memory>
__device__ __forceinline__ void LoadQueries(const AttendParams& p, Memory& sm, const Work& work, int stage, int more) {
  const int token = work.q_begin + work.begin;
  const int batch = p.cu_seqlens_q ? 0 : work.sequence;
  uint64_t* const full = &sm.q_full[stage];
  BarrierArriveExpect(full, SHAPE::kPanels * Memory::kPanelRowsBytes * p.tile_tokens * p.heads_per_tile + more);
#pragma unroll
  for (int i = 0; i < SHAPE::kPanels; ++i) {
    BulkLoad(sm.q[stage] + i * Memory::kQPanelBytes, &p.q, full, i * kPanelColumns, work.head, token, batch);
  }
}

// Columns from 32 word on of a step to KeyTile::wanted: of each 8 bits the two from 2 l on, together in a byte.
__device__ __forceinline__ void SpreadColumnsOf(int word, uint32_t columns, uint32_t* wanted) {
  auto* const bytes = reinterpret_cast<uint8_t*>(wanted);
#pragma unroll
  for (int l = 0; l < 4; ++l) {
    uint32_t x = columns >> 2 * l & 0x03030303;
    x |= x >> 6;
    bytes[4 * l + word] = static_cast<uint8_t>((x & 15) | (x >> 12 & 240));
  }
}

// All columns of a step, 32 each in the first lanes' `columns`.
template <int KEYS>
__device__ __forceinline__ void SpreadColumns(uint32_t columns, int lane, uint32_t* wanted) {
  if (lane < KEYS / 32) SpreadColumnsOf(lane, columns, wanted);
}

// A sequence's last block may be shorter than the others, and counts where rows see all of it: not causal. Whether a
// tile of means that begins at `block` has such a one; its column, else -1, and its keys.
template <int KEYS>
__device__ __forceinline__ bool HasShortBlock(const AttendArgs& p, const Work& work, int block, int* column,
                                              int* keys) {
  const int k_len = work.k_len, last = p.by_block(k_len - 1);
  *keys = k_len - last * p.block_size;
  const bool shorter = last < work.full && *keys < p.block_size && last >= block && last < block + KEYS;
  *column = shorter ? last - block : -1;
  return shorter;
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_LOADING_SIDE_CUH_
