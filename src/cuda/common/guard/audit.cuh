// The guard's audit: all scores of a few rows of queries, and how much of each row's softmax lies on keys that the mask
// leaves out. PRODUCT: PanelProductSm90 or PanelProductPortable.
//
// A CTA takes up to 128 rows of one KV head's query heads, 64 per warpgroup, and a run of keys, so that each key is
// read once per 128 rows; every multiprocessor has two CTAs, and one's exponentials (as many cycles as the products on
// Hopper) hide behind the other's products. Queries stay in shared memory, keys stream through two stages, a barrier
// per step of 64 or 128 keys; what becomes of the scores is audit_sums.cuh's. Rows of a tile are neighbours in the
// prompt, so that only a few steps need a mask, and a warpgroup whose rows see no more keys is done.
//
// 131,072 tokens, 32 heads, 64 rows each: 34 GFLOP, 0.13 G exponentials, 0.3 GB of keys from L2. The instruction cache
// holds the loop: each of its phases is there once.
#ifndef FLASHPREFILL_CUDA_COMMON_GUARD_AUDIT_CUH_
#define FLASHPREFILL_CUDA_COMMON_GUARD_AUDIT_CUH_

#include "cuda/common/grid_control.cuh"
#include "cuda/common/guard/audit_sums.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/swizzled_rows.cuh"

namespace flashprefill::cuda {

struct AuditStep {
  int key; // the first
  int keys;
};

// A CTA's steps. One is of KEYS keys of a block, the last one of a large block of fewer; or of as many small blocks as
// fit. Pieces are of whole blocks: GuardArgs::piece_keys.
template <int KEYS>
struct AuditSteps {
  int begin, end;
  int size; // of a block
  int blocks_per_step, steps_per_block;

  __device__ __forceinline__ AuditSteps(const GuardArgs& a, int most_seen, int piece) {
    size = a.rules.block_size;
    blocks_per_step = max(1, KEYS / size);
    steps_per_block = (size + KEYS - 1) / KEYS;
    const int run = blocks_per_step * size; // whole blocks
    const int runs = (most_seen + run - 1) / run, per_piece = a.piece_keys / run;
    begin = min(piece * per_piece, runs) * steps_per_block;
    end = min((piece + 1) * per_piece, runs) * steps_per_block;
  }

  __device__ __forceinline__ AuditStep At(int i) const {
    if (steps_per_block == 1) return {i * blocks_per_step * size, blocks_per_step * size};
    const int block = i / steps_per_block, in_block = (i - block * steps_per_block) * KEYS;
    return {block * size + in_block, min(KEYS, size - in_block)};
  }
};

template <class PRODUCT, bool PORTABLE, class T, int PANELS, bool ANY_BLOCK, bool LISTED>
class AuditRun {
 public:
  static constexpr int kRows = GuardTileRows(PANELS * 64, PORTABLE);
  static constexpr int kKeys = GuardStepKeys(ANY_BLOCK, PORTABLE);
  static constexpr int kThreads = 2 * kRows; // a warpgroup per 64 rows
  static constexpr int kStages = PRODUCT::template kStages<PANELS>;
  static constexpr int kStageBytes = kPanelBytes<PANELS, kKeys>, kGroupBytes = kPanelBytes<PANELS, kProductRows>;
  static constexpr int kQueryBytes = kRows / kProductRows * kGroupBytes;
  static constexpr int kBytes = kQueryBytes + kStages * kStageBytes + kPanelAlign;

  struct Shared {
    AuditRow rows[kRows];
    int most_seen[kThreads / 32]; // by warps' rows
  };

  __device__ __forceinline__ AuditRun(const GuardArgs& a, Shared& shared, char* memory)
      : a_(a), p_(a.d.p), shared_(shared), memory_(memory) {
    int unit = static_cast<int>(blockIdx.x);
    const int units = p_.batch * p_.kv_heads, in_tile = units * a.pieces;
    tile_ = a.row_tiles - 1 - unit / in_tile; // the last rows see the most
    unit %= in_tile;
    piece_ = unit / units;
    unit %= units;
    kv_ = unit % p_.kv_heads;
    s_ = SequenceAt(a.d, unit / p_.kv_heads);
  }

  __device__ __forceinline__ void Run() {
    if (threadIdx.x < kRows) PlaceRow(static_cast<int>(threadIdx.x));
    __syncthreads();
    const int warp = static_cast<int>(threadIdx.x) / 32, group = warp / 4;
    AuditSums<kKeys, ANY_BLOCK ? 16 : kKeys, LISTED> sums(a_, shared_.rows + warp * 16);
    if (threadIdx.x % 32 == 0) shared_.most_seen[warp] = sums.most_seen();
    __syncthreads();
    int group_most = 0;
    most_seen_ = 0;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) {
      most_seen_ = max(most_seen_, shared_.most_seen[w]);
      if (w / 4 == group) group_most = max(group_most, shared_.most_seen[w]);
    }
    const AuditSteps<kKeys> steps(a_, most_seen_, piece_);
    if (steps.begin >= steps.end) return;

    LoadQueries();
    LoadKeys(steps.At(steps.begin), 0);
    const char* const queries = memory_ + group * kGroupBytes;
#pragma unroll 1
    for (int i = steps.begin; i < steps.end; ++i) {
      const AuditStep step = steps.At(i);
      const int stage = (i - steps.begin) % kStages;
      const auto load_next = [&] {
        if (i + 1 < steps.end) LoadKeys(steps.At(i + 1), (stage + 1) % kStages);
      };
      AsyncCopyWaitAll();
      PRODUCT::Fence();
      __syncthreads(); // the step's keys are there for all, and all have done with the other stage
      const bool wanted = step.key < group_most;
      float scores[kKeys / 2];
      if (wanted) {
        const char* const keys = memory_ + kQueryBytes + stage * kStageBytes;
        if constexpr (kStages > 1) {
          PRODUCT::template Multiply<T, PANELS, kKeys>(scores, queries, keys, load_next);
        } else {
          PRODUCT::template Multiply<T, PANELS, kKeys>(scores, queries, keys, [] {});
        }
      }
      if (kStages == 1) __syncthreads();
      if (kStages == 1 || !wanted) load_next();
      if (step.key < sums.most_seen()) sums.Add(scores, step.key, step.keys, steps.blocks_per_step == 1);
    }
    const int64_t unit = (int64_t{s_.index} * p_.kv_heads + kv_) * a_.row_tiles + tile_;
    sums.Store(a_.parts + (unit * a_.pieces + piece_) * kRows + warp * 16);
  }

 private:
  static constexpr int kChunks = PANELS * 8; // of 16 bytes per row
  static constexpr int kRowsAtOnce = kThreads / kChunks;

  __device__ __forceinline__ void PlaceRow(int at) {
    AuditRow& to = shared_.rows[at];
    to.seen = 0;
    const int u = tile_ * kRows + at, j = u / a_.group, head = kv_ * a_.group + u - j * a_.group;
    if (j >= a_.most_rows || j >= a_.heads[s_.index * p_.q_heads + head].strata) return;
    const int64_t place = GuardRowBase(a_, s_.index, head) + j;
    const int row = a_.drawn[place];
    to = AuditRow{GuardKeysSeen(a_, s_, row), head, row, GuardMaskRow(a_, s_, head, a_.rules.by_tile(row)) * a_.words,
                  place * a_.listed_words};
  }

  // Where a thread's chunk of its first row lies: of rows of `rows` in a panel. The others are kRowsAtOnce apart.
  static __device__ __forceinline__ uint32_t PlaceOf(int chunk, int row, int rows) {
    return chunk / 8 * (rows * kPanelRowBytes) + row * kPanelRowBytes + (chunk % 8 ^ row % 8) * 16;
  }

  __device__ __forceinline__ void LoadQueries() const {
    const int chunk = threadIdx.x % kChunks;
    const T* const data = static_cast<const T*>(p_.q.data);
#pragma unroll 4
    for (int at = threadIdx.x / kChunks; at < kRows; at += kRowsAtOnce) {
      const AuditRow& row = shared_.rows[at];
      const bool valid = row.seen > 0 && chunk * 8 < p_.head_dim;
      const T* from = data;
      if (valid) from += RowOffsetAt(p_, p_.q.stride, s_, row.row, row.head) + chunk * 8;
      const uint32_t group = SharedAddress(memory_) + at / kProductRows * kGroupBytes;
      AsyncCopy16(group + PlaceOf(chunk, at % kProductRows, kProductRows), from, valid);
    }
  }

  // Where keys lie evenly a thread finds the next one by an addition.
  __device__ __forceinline__ void LoadKeys(const AuditStep& step, int stage) const {
    const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
    const bool wanted = chunk * 8 < p_.head_dim;
    const T* const data = static_cast<const T*>(p_.k.data) + (wanted ? chunk * 8 : 0);
    const int end = min(step.key + step.keys, most_seen_);
    const uint32_t to = SharedAddress(memory_) + kQueryBytes + stage * kStageBytes;
    const auto copy = [&](int row, const T* from) {
      AsyncCopy16(to + PlaceOf(chunk, row, kKeys), from, wanted && step.key + row < end);
    };
    if (p_.block_table == nullptr) {
      const T* from = data + KeyOffsetAt(p_, p_.k.stride, s_, step.key + first, kv_);
      const int64_t apart = kRowsAtOnce * p_.k.stride[1];
#pragma unroll
      for (int row = 0; row < kKeys; row += kRowsAtOnce, from += apart) copy(row + first, from);
      return;
    }
#pragma unroll 4
    for (int row = first; row < kKeys; row += kRowsAtOnce) {
      copy(row, data + KeyOffsetAt(p_, p_.k.stride, s_, min(step.key + row, end - 1), kv_));
    }
  }

  const GuardArgs& a_;
  const Problem& p_;
  Shared& shared_;
  char* const memory_;
  DeviceSequence s_;
  int kv_, tile_, piece_;
  int most_seen_; // keys that some row of the CTA sees
};

template <class RUN>
__global__ void __launch_bounds__(RUN::kThreads, RUN::kBytes < 112 * 1024 ? 2 : 1)
    AuditKernel(const __grid_constant__ GuardArgs a) {
  extern __shared__ char memory[];
  __shared__ typename RUN::Shared shared;
  GridWait();
  GridRelease();
  if (GuardSkips(a)) return;
  RUN(a, shared, AlignedPanels(memory)).Run();
}

template <class RUN>
cudaError_t LaunchGuardAuditRun(const GuardArgs& args, cudaStream_t stream) {
  const auto kernel = AuditKernel<RUN>;
  if (cudaError_t e = AllowSharedOnly(kernel, RUN::kBytes)) return e;
  const int64_t grid = int64_t{args.d.p.batch} * args.d.p.kv_heads * args.row_tiles * args.pieces;
  return LaunchOverlapped(kernel, true, grid, RUN::kThreads, RUN::kBytes, stream, args);
}

template <class PRODUCT, bool PORTABLE, class T, int PANELS>
cudaError_t LaunchGuardAuditWith(const GuardArgs& args, cudaStream_t stream) {
  if (args.listed_words > 0) {
    return LaunchGuardAuditRun<AuditRun<PRODUCT, PORTABLE, T, PANELS, true, true>>(args, stream);
  }
  if (args.any_block) return LaunchGuardAuditRun<AuditRun<PRODUCT, PORTABLE, T, PANELS, true, false>>(args, stream);
  return LaunchGuardAuditRun<AuditRun<PRODUCT, PORTABLE, T, PANELS, false, false>>(args, stream);
}

// By head_dim.
template <class PRODUCT, bool PORTABLE, class T>
cudaError_t LaunchGuardAuditOf(const GuardArgs& args, cudaStream_t stream) {
  const int head_dim = args.d.p.head_dim;
  if (head_dim <= 64) return LaunchGuardAuditWith<PRODUCT, PORTABLE, T, 1>(args, stream);
  if (head_dim <= 128) return LaunchGuardAuditWith<PRODUCT, PORTABLE, T, 2>(args, stream);
  return LaunchGuardAuditWith<PRODUCT, PORTABLE, T, 4>(args, stream);
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_GUARD_AUDIT_CUH_
