// Masks that skip (fp_block_mask::skip), on every GPU since Ampere: how the kernel of attend.cuh goes through a tile's
// kept blocks then, by chunks of 128 keys from the lowest up.
//
// A row decides on a chunk by its largest score, and a warp has registers for the scores of half a chunk. So scores are
// computed twice: first for their maxima, then, by warps of which some row counts the chunk, for the weights. V is
// loaded only where some warp does. A chunk that no row counts takes half of dense attention's products and none of its
// exponentials, one that counts takes half more: this pays where most chunks are skipped, and is there for its result
// elsewhere. The second CTA of the multiprocessor covers the loads. Means of blocks that were left out come last, in
// the same way, and are never skipped.
#ifndef FLASHPREFILL_CUDA_SM80_ATTEND_SKIP_CUH_
#define FLASHPREFILL_CUDA_SM80_ATTEND_SKIP_CUH_

#include "core/skip.h"
#include "cuda/sm80/attend/attend.cuh"

namespace flashprefill::cuda {

template <class T, class SHAPE>
__device__ __forceinline__ void PortableAttendRun<T, SHAPE>::Chunks() {
  constexpr int kSteps = kSkipKeys / kKeys; // of a chunk
  static_assert(kSteps * kKeys == kSkipKeys && 2 * kSteps <= kStepRing && kMostSkipBlocks == kListBlocks);
  const auto place = [&](int step) { // no register holds a number that was asked for earlier
#pragma unroll 1
    for (int s = step; s < min(step + kSteps, c_.state.steps); ++s) keys_.Tell(s, keys_.Ask(s));
  };
  const auto load = [&](int which, int step) {
#pragma unroll 1
    for (int s = step; s < step + kSteps; ++s) Load(which, s, c_.state.steps);
    AsyncCopyCommit();
  };
  if (keys_.Places()) place(0);
  if (threadIdx.x < kPortableRows) c_.skip.counted[threadIdx.x] = -INFINITY;
  if (threadIdx.x == 0) {
    c_.skip.pairs = 0;
    const bool skips = c_.state.what != ListOf::kMeans && QueryLength(p_, c_.work.sequence) * p_.group >= kRowsThatSkip;
    c_.skip.below = skips ? p_.skip.below : -INFINITY;
  }
  __syncthreads();
#pragma unroll 1
  for (int j = 0; j < c_.state.steps; j += kSteps) {
    load(0, j);
    if (keys_.Places()) place(j + kSteps);
    WaitForCopies();
    float top[kRowTiles][2];
    const int slices = min(kSteps, c_.state.steps - j) * (kKeys / kSlice);
    Largest(j, slices, top);
    int left_out = 0; // a bit per row of this lane
    int pairs = 0;    // of a row and a key that is skipped
    bool counts = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float counted = c_.skip.counted[RowOf(m, r)];
        const bool out = top[m][r] < counted + c_.skip.below;
        const bool exists = RowOf(m, r) < c_.work.tokens * p_.heads_per_tile;
        __syncwarp(); // the row's lanes have read what it counted
        if (!out && lane_ % 4 == 0) c_.skip.counted[RowOf(m, r)] = fmaxf(counted, top[m][r]);
        left_out |= out << (2 * m + r);
        counts |= exists && !out;
        if (out && exists) pairs += Seen(j, RowOf(m, r));
      }
    }
    if (__any_sync(~0u, left_out)) {
      pairs = __reduce_add_sync(~0u, pairs);
      if (lane_ == 0) atomicAdd(&c_.skip.pairs, pairs);
    }
    counts = __any_sync(~0u, counts);
    if (!__syncthreads_or(counts)) continue; // all have done with K
    load(1, j);
    WaitForCopies();
    if (counts) Count(j, slices, left_out);
    __syncthreads(); // all have done with K and V
  }
  __syncthreads();
  if (threadIdx.x == 0 && p_.skip.skipped && c_.state.what != ListOf::kMeans) {
    const int64_t all = int64_t{c_.work.tokens} * p_.heads_per_tile * p_.block_size;
    p_.skip.skipped[c_.work.mask_row] = static_cast<int32_t>((c_.skip.pairs + all / 2) / all);
  }
}

// Masked scores of the chunk from step j on, its i-th slice: registers would not do for two. Returns whether a mask was
// needed.
template <class T, class SHAPE>
__device__ __forceinline__ int PortableAttendRun<T, SHAPE>::ScoresOf(int j, int i, Slice (&s)[1]) {
  const int step = j + i / (kKeys / kSlice), slice = i % (kKeys / kSlice);
  Scores(KeysOf(step) + slice * kSlice * kRowBytes, s);
  const StepControl& control = c_.step[step % kStepRing];
  if (control.masked | control.means) Mask(step, slice, s[0]);
  return control.masked;
}

// The largest score of each of this lane's rows in the chunk from step j on.
template <class T, class SHAPE>
__device__ __forceinline__ void PortableAttendRun<T, SHAPE>::Largest(int j, int slices, float (&top)[kRowTiles][2]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) top[m][0] = top[m][1] = -INFINITY;
#pragma unroll 1
  for (int i = 0; i < slices; ++i) {
    Slice s[1];
    ScoresOf(j, i, s);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kSlice / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) top[m][e / 2] = fmaxf(top[m][e / 2], s[0][m][n][e]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[m][r] = fmaxf(top[m][r], __shfl_xor_sync(~0u, top[m][r], 1));
      top[m][r] = fmaxf(top[m][r], __shfl_xor_sync(~0u, top[m][r], 2));
    }
  }
}

// Weights and P V of a chunk, without the rows that leave it out.
template <class T, class SHAPE>
__device__ __forceinline__ void PortableAttendRun<T, SHAPE>::Count(int j, int slices, int left_out) {
#pragma unroll 1
  for (int i = 0; i < slices; ++i) {
    Slice s[1];
    const int masked = ScoresOf(j, i, s);
    if (left_out) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kSlice / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (left_out >> (2 * m + e / 2) & 1) s[0][m][n][e] = -INFINITY;
          }
        }
      }
    }
    Weights weights;
    WeighSlice(s[0], weights, masked);
    const int step = j + i / (kKeys / kSlice);
    AddValues(KeysOf(step) + SHAPE::kStageBytes, i % (kKeys / kSlice), weights);
  }
}

// Of this lane's columns in the chunk from step j on, how many are keys that a row sees.
template <class T, class SHAPE>
__device__ __forceinline__ int PortableAttendRun<T, SHAPE>::Seen(int j, int row) const {
  const int last_key = min(c_.work.first_position + TokenOf(row), c_.work.k_len - 1);
  int seen = 0;
#pragma unroll 1
  for (int step = j; step < j + kSkipKeys / kKeys; ++step) {
    if (!c_.step[step % kStepRing].masked) {
      seen += kKeys / 4;
      continue;
    }
#pragma unroll 1
    for (int i = lane_ % 4; i < kKeys; i += 4) seen += c_.position[step % kStepRing][i] <= last_key;
  }
  return seen;
}

// The content of an instantiation file: a dtype's kernel that skips, for a head dimension.
#define FLASHPREFILL_INSTANTIATE_PORTABLE_SKIP(T, HEAD_DIM, SMALL)  \
  template <>                                                       \
  PortableAttendPlan PortableSkip<T, HEAD_DIM, SMALL>() {           \
    return PortablePlanOf<T, PortableSkipShape<HEAD_DIM, SMALL>>(); \
  }

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM80_ATTEND_SKIP_CUH_
