// Some query rows times all keys of a part of a sequence, 64 keys at a time: a ring of keys and the rows in shared
// memory, for one warpgroup. A thread copies the same 16 bytes of keys a fixed number apart, so that where keys lie
// evenly it finds the next one by an addition. PRODUCT: PanelProductSm90 or PanelProductPortable.
#ifndef FLASHPREFILL_CUDA_COMMON_KEY_PRODUCT_CUH_
#define FLASHPREFILL_CUDA_COMMON_KEY_PRODUCT_CUH_

#include "cuda/common/numbers.cuh"
#include "cuda/common/sequence.cuh"
#include "cuda/common/swizzled_rows.cuh"

namespace flashprefill::cuda {

// The keys that a CTA multiplies its rows with: steps of 64 from key `begin` on.
struct KeySpan {
  DeviceSequence sequence;
  int kv;
  int begin, steps;
};

template <class PRODUCT, typename T, int PANELS, int COLUMNS>
struct KeyProduct {
  static constexpr int kRingStages = PRODUCT::template kStages<PANELS>;
  static constexpr int kRowBytes = kPanelBytes<PANELS, COLUMNS>, kStageBytes = kPanelBytes<PANELS, kProductRows>;
  static constexpr int kBytes = kRowBytes + kRingStages * kStageBytes;
  static constexpr int kChunks = PANELS * 8, kKeysAtOnce = kPanelThreads / kChunks;

  const Problem& p;
  const Divider& by_page;
  const KeySpan& span;
  char* shared;
  int chunk, key;       // of 16 bytes; the next key to be copied
  bool wanted;          // whether rows have that chunk
  const T* next;        // where keys lie evenly, the next source; else the chunk of the first page's first key
  int64_t apart;        // elements
  uint32_t ring, place; // of shared memory; of the first key's chunk in a stage, but for the swizzle
  int swizzle;

  // row(r) is the first element of row r, or null for zeros.
  template <typename Row>
  __device__ KeyProduct(const Problem& problem, const Divider& divider, const KeySpan& its_span, char* memory,
                        Row&& row)
      : p(problem), by_page(divider), span(its_span), shared(memory) {
    const int first = threadIdx.x / kChunks;
    chunk = threadIdx.x % kChunks;
    key = span.begin + first;
    wanted = chunk * 8 < p.head_dim;
    apart = kKeysAtOnce * p.k.stride[1];
    next = static_cast<const T*>(p.k.data) + (wanted ? chunk * 8 : 0);
    next += p.block_table ? span.kv * p.k.stride[2] : KeyOffsetAt(p, p.k.stride, span.sequence, key, span.kv);
    ring = SharedAddress(shared) + kRowBytes;
    place = chunk / 8 * (kProductRows * kPanelRowBytes) + first * kPanelRowBytes;
    swizzle = chunk % 8 ^ first % 8;
    CopyRows<PANELS, COLUMNS>(shared, p.head_dim, p.q.data, row);
    CopyKeys(0);
  }

  // Of each step once, in order.
  __device__ __forceinline__ void CopyKeys(int step) {
    const uint32_t to = ring + step % kRingStages * kStageBytes + place;
    auto copy = [&](int i, const T* from) {
      const int row = i * kKeysAtOnce;
      AsyncCopy16(to + row * kPanelRowBytes + (swizzle ^ row % 8) * 16, from, wanted && key < span.sequence.k_len);
    };
    if (p.block_table == nullptr) {
#pragma unroll
      for (int i = 0; i < kProductRows / kKeysAtOnce; ++i, key += kKeysAtOnce, next += apart) copy(i, next);
      return;
    }
#pragma unroll 8
    for (int i = 0; i < kProductRows / kKeysAtOnce; ++i, key += kKeysAtOnce) {
      const int index = by_page(min(key, span.sequence.k_len - 1));
      copy(i,
           next + PageAt(p, span.sequence.index, index) * p.k.stride[0] + (key - index * p.page_size) * p.k.stride[1]);
    }
  }

  // The product of a step, while the next one's keys come. One barrier, which all other shared memory may count on.
  __device__ __forceinline__ void Step(int step, float (&d)[COLUMNS / 2]) {
    AsyncCopyWaitAll();
    PRODUCT::Fence();
    __syncthreads();
    const char* const keys = shared + kRowBytes + step % kRingStages * kStageBytes;
    const auto next_keys = [&] {
      if (step + 1 < span.steps) CopyKeys(step + 1);
    };
    if constexpr (kRingStages > 1) {
      PRODUCT::template Multiply<T, PANELS, COLUMNS>(d, keys, shared, next_keys);
    } else {
      PRODUCT::template Multiply<T, PANELS, COLUMNS>(d, keys, shared, [] {});
      __syncthreads();
      next_keys();
    }
  }
};

// Sums of exponentials of a warp's 16 keys of a step, by row, over as many steps as there are. Value 4 c + 2 half + e
// of a thread is key 16 warp + lane / 4 + 8 half, row 8 c + 2 (lane % 4) + e. Exponentials need a common reference, and
// any will do that keeps the sum in range: a warp's own, in shared memory, the largest score of its first keys; where a
// sum gets too large or is no number the step is done again with a new one, and without non-finite scores.
template <int COLUMNS>
struct RowSums {
  float* reference; // [COLUMNS], of this warp
  float exponent_scale;
  float sum[COLUMNS / 4] = {}; // of its two keys of each step

  __device__ static int RowOfSum(int i) { return i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2; }

  __device__ void Start() {
    for (int j = threadIdx.x % 32; j < COLUMNS; j += 32) reference[j] = -INFINITY;
    __syncwarp();
  }

  // whole: every row sees every key of the step; else sees(row, half) is asked.
  template <typename Sees>
  __device__ __forceinline__ void Add(const float (&d)[COLUMNS / 2], bool whole, Sees&& sees) {
    const int pair = 2 * (threadIdx.x % 4);
    // Add up against the references, as far as that goes.
    float x[COLUMNS / 4], check = 0;
#pragma unroll
    for (int c = 0; c < COLUMNS / 8; ++c) {
      const float2 base = *reinterpret_cast<const float2*>(&reference[8 * c + pair]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float offset = e ? -base.y : -base.x;
        x[2 * c + e] =
            Exp2(fmaf(d[4 * c + e], exponent_scale, offset)) + Exp2(fmaf(d[4 * c + 2 + e], exponent_scale, offset));
        check += x[2 * c + e];
      }
    }
    if (__all_sync(~0u, whole && check < kLargeSum)) {
#pragma unroll
      for (int i = 0; i < COLUMNS / 4; ++i) sum[i] += x[i];
      return;
    }
    // Else again, with a mask and new references.
#pragma unroll
    for (int i = 0; i < COLUMNS / 4; ++i) {
      const int j = i / 2 * 8 + pair + i % 2;
      float z[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float score = d[i / 2 * 4 + 2 * half + i % 2] * exponent_scale;
        z[half] = sees(j, half) && IsFinite(score) ? score : -INFINITY;
      }
      const float old = reference[j];
      float largest = fmaxf(z[0], z[1]);
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
      largest = fmaxf(largest, old);
      const float base = largest == -INFINITY ? 0.f : largest; // nothing finite yet: this leads here again
      sum[i] = sum[i] * Exp2(old - base) + (Exp2(z[0] - base) + Exp2(z[1] - base));
      __syncwarp();
      if (threadIdx.x % 32 < 4) reference[j] = largest;
    }
    __syncwarp();
  }
};

// Logarithms of the rows' sums, over a warp's keys: to[row * apart]. Each lane has a quarter of the rows' sums, of its
// own keys, and the eight lanes of a row exchange halves, so that of 64 rows 14 shuffles do for all. The sums begin
// again.
template <int COLUMNS>
__device__ __forceinline__ void StoreLogSums(RowSums<COLUMNS>& rows, float* to, int apart) {
  float(&sum)[COLUMNS / 4] = rows.sum;
  const int lane = threadIdx.x % 32;
  int first = 0; // of the sums that are left
#pragma unroll
  for (int stage = 0; stage < 3; ++stage) {
    const int offset = 16 >> stage, left = COLUMNS / 8 >> stage;
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < left; ++i) {
      const float other = __shfl_xor_sync(~0u, upper ? sum[i] : sum[i + left], offset);
      sum[i] = (upper ? sum[i + left] : sum[i]) + other;
    }
    first += upper ? left : 0;
  }
#pragma unroll
  for (int i = 0; i < COLUMNS / 32; ++i) {
    const int row = RowSums<COLUMNS>::RowOfSum(first + i);
    to[row * apart] = rows.reference[row] == -INFINITY ? -INFINITY : __log2f(sum[i]) + rows.reference[row];
  }
#pragma unroll
  for (float& x : sum) x = 0;
}

// log2 of the sum of both.
__device__ inline float AddLogs(float a, float b) {
  const float largest = fmaxf(a, b);
  return largest == -INFINITY ? -INFINITY : __log2f(Exp2(a - largest) + Exp2(b - largest)) + largest;
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_KEY_PRODUCT_CUH_
