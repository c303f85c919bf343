// The shapes of the guard's audit kernel, and the steps by which a CTA goes over its keys. See audit.cuh.
#ifndef FLASHPREFILL_CUDA_SM80_GUARD_AUDIT_PLAN_CUH_
#define FLASHPREFILL_CUDA_SM80_GUARD_AUDIT_PLAN_CUH_

#include "cuda/common/guard/args.h"

namespace flashprefill::cuda {

template <int HEAD_DIM, int WARPS>
struct AuditShape {
  static constexpr int kHeadDim = HEAD_DIM;
  static constexpr int kWarps = WARPS, kThreads = 32 * WARPS;
  static constexpr int kRowTiles = HEAD_DIM <= 128 ? 2 : 1; // of 16 rows, per warp
  static constexpr int kWarpRows = 16 * kRowTiles, kRows = kWarpRows * WARPS;
  static constexpr int kPanels = HEAD_DIM / 64;
  static constexpr int kKeys = HEAD_DIM <= 128 ? 128 : 64; // of a step
  static constexpr int kStageBytes = kKeys * HEAD_DIM * 2;
  static constexpr int kQueryBytes = kRows * HEAD_DIM * 2;
  static constexpr int kMemory = 2 * kStageBytes; // queries come through the stages
  static_assert(kQueryBytes <= kMemory && kQueryBytes % kStageBytes == 0);
};

// Rows of a CTA, in shared memory.
template <class SHAPE>
struct AuditRows {
  int seen[SHAPE::kRows]; // keys; 0 for a row that is not there
  int head[SHAPE::kRows], row[SHAPE::kRows];
  int64_t mask_row[SHAPE::kRows];
  int64_t list[SHAPE::kRows]; // of GuardArgs::listed
  int most_seen[SHAPE::kWarps];
};

struct AuditStep {
  int key; // the first
  int keys;
};

// A CTA's steps. One is of kKeys keys of a block, the last one of a large block of fewer; or of as many small blocks as
// fit. Pieces are of whole blocks.
template <int KEYS>
struct AuditSteps {
  int begin, end;
  int size; // of a block
  int blocks_per_step, steps_per_block;

  static __device__ __forceinline__ AuditSteps Of(const GuardArgs& a, int most_seen, int piece) {
    AuditSteps s;
    s.size = a.rules.block_size;
    s.blocks_per_step = max(1, KEYS / s.size);
    s.steps_per_block = (s.size + KEYS - 1) / KEYS;
    const int blocks = a.rules.by_block(most_seen + s.size - 1);
    const int runs = (blocks + s.blocks_per_step - 1) / s.blocks_per_step; // of whole blocks
    const int per_piece = (runs + a.pieces - 1) / a.pieces;
    s.begin = min(piece * per_piece, runs) * s.steps_per_block;
    s.end = min((piece + 1) * per_piece, runs) * s.steps_per_block;
    return s;
  }

  __device__ __forceinline__ AuditStep At(int i) const {
    if (steps_per_block == 1) return {i * blocks_per_step * size, blocks_per_step * size};
    const int block = i / steps_per_block, in_block = (i - block * steps_per_block) * KEYS;
    return {block * size + in_block, min(KEYS, size - in_block)};
  }
};

using GuardAuditKernel = void (*)(GuardArgs);
struct GuardAuditPlan {
  GuardAuditKernel kernel;
  int threads, bytes;
};
template <class T>
GuardAuditPlan GuardAudit(int head_dim, bool many_rows);

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM80_GUARD_AUDIT_PLAN_CUH_
