// The softmax of a head's last rows over all keys, added up by key and by distance: two launches, each of which makes
// the product of those rows with every key, because writing 128 x Lk scores per head would cost more than making them
// twice. A CTA is one warpgroup with one product's rows and one chunk of keys.
//
//     D[64 keys, 64 or 128 rows] = K[64, d] . Q[rows, d]^T
//
// First launch: the rows' denominators. A thread adds up its own two keys per step for each of its columns and meets
// the others once a chunk (key_product.cuh). Results are logarithms, so the warps' references need not agree.
//
// Second launch: shares. Columns are sums over a row of D: inside a thread, then over four lanes. Distances run across
// D, so shares go through shared memory, sheared: row t of it has at y = t + r the share of row r of Q at key t, and a
// distance is one y. A thread's two keys lie 8 apart, and so do its columns: the upper key's share in one column
// and the lower key's in the next have the same distance, so that half of the sums are made before. A lane adds up
// three distances, 64 apart, over half of the rows; a distance that the next step's keys find too is carried there.
// Every sum has one order, whatever else runs: no atomics.
#ifndef FLASHPREFILL_CUDA_COMMON_VERTICAL_SLASH_SUMS_CUH_
#define FLASHPREFILL_CUDA_COMMON_VERTICAL_SLASH_SUMS_CUH_

#include <limits>

#include "cuda/common/key_product.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/vertical_slash/args.h"

namespace flashprefill::cuda {
namespace {

constexpr int kWarps = kPanelThreads / 32;
constexpr int kShareRows = 32; // 8 warp + lane / 4: a thread's lower key, whose upper one has joined it

// Floats per row of shares: as far as its keys reach, and 8 modulo 32 but for one, so that what 16 lanes store, 8 bytes
// each, falls on all banks.
constexpr int SharePitch(int columns) { return columns + 71; }

// The work of a CTA.
struct SumsUnit : KeySpan {
  int head, first_row;  // the first of its rows
  int slot, first_slot; // of the sequence
  int64_t index;        // (head, part)
};

__device__ inline bool PlaceUnit(const SumsArgs& args, SumsUnit& unit) {
  const VerticalSlashShape& a = args.shape;
  const Problem& p = a.d.p;
  const int units_per_kv = p.q_heads / p.kv_heads * a.parts;
  const int pair = a.by_units(blockIdx.x), of_kv = blockIdx.x - pair * units_per_kv;
  unit.slot = a.by_kv(pair);
  unit.kv = pair - unit.slot * p.kv_heads;
  unit.index = int64_t{unit.kv} * units_per_kv + of_kv;
  unit.head = static_cast<int>(unit.index / a.parts);
  unit.first_row = static_cast<int>(unit.index % a.parts) * a.columns;
  if (TestBit(args.skipped, unit.head % kMaxTableHeads)) return false;
  const bool packed = PackedKeys(p);
  const int b =
      packed ? SequenceOfSlot(p.batch, unit.slot, [&](int i) { return SlotBase(a, i); }) : a.by_slots(unit.slot);
  unit.sequence = SequenceAt(a.d, b);
  unit.first_slot = SlotBase(a, b);
  const int index = unit.slot - unit.first_slot;
  unit.begin = index * a.chunk;
  const int keys = min(a.chunk, unit.sequence.k_len - unit.begin);
  if (index < 0 || keys <= 0 || KeepsEverything(a, unit.sequence)) return false;
  unit.steps = (keys + kProductRows - 1) / kProductRows;
  return true;
}

// The product of a unit's rows with its keys.
template <class PRODUCT, typename T, int PANELS, int COLUMNS>
struct SumsProduct : KeyProduct<PRODUCT, T, PANELS, COLUMNS> {
  int first_row;

  __device__ SumsProduct(const VerticalSlashShape& a, const SumsUnit& unit, char* memory)
      : KeyProduct<PRODUCT, T, PANELS, COLUMNS>(a.d.p, a.by_page, unit, memory, RowsOf(a, unit)),
        first_row(unit.first_row) {}

  // Whether every row sees every key of a step.
  __device__ __forceinline__ bool Whole(int step) const {
    const KeySpan& span = this->span;
    return span.begin + step * kProductRows + kProductRows + first_row + COLUMNS - 1 <= span.sequence.k_len;
  }

 private:
  static __device__ auto RowsOf(const VerticalSlashShape& a, const SumsUnit& unit) {
    const int last = unit.sequence.q_len - 1 - unit.first_row, rows = min(a.rows, unit.sequence.q_len);
    return [=, &a, &unit](int r) -> const T* {
      if (unit.first_row + r >= rows) return nullptr;
      return static_cast<const T*>(a.d.p.q.data) +
             RowOffsetAt(a.d.p, a.d.p.q.stride, unit.sequence, last - r, unit.head);
    };
  }
};

template <class PRODUCT, typename T, int PANELS, int COLUMNS>
__global__ void __launch_bounds__(kPanelThreads, PANELS == 4     ? 1
                                                 : COLUMNS == 64 ? 4
                                                                 : 3)
    RowSumsKernel(const __grid_constant__ SumsArgs args) {
  extern __shared__ char raw[];
  __shared__ float reference[kWarps][COLUMNS], partial[kWarps][COLUMNS];
  const VerticalSlashShape& a = args.shape;
  SumsUnit unit;
  if (!PlaceUnit(args, unit)) return;
  SumsProduct<PRODUCT, T, PANELS, COLUMNS> product(a, unit, AlignedPanels(raw));
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  RowSums<COLUMNS> sums{reference[warp], a.exponent_scale};
  sums.Start();
#pragma unroll 1
  for (int step = 0; step < unit.steps; ++step) {
    float d[COLUMNS / 2];
    product.Step(step, d);
    const int seen = unit.sequence.k_len - unit.first_row - (unit.begin + step * kProductRows + 16 * warp + lane / 4);
    sums.Add(d, product.Whole(step), [&](int j, int half) { return j + 8 * half < seen; });
  }

  // Join lanes, then warps.
#pragma unroll
  for (int i = 0; i < COLUMNS / 4; ++i) {
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) sums.sum[i] += __shfl_xor_sync(~0u, sums.sum[i], offset);
    if (lane < 4) partial[warp][sums.RowOfSum(i)] = sums.sum[i];
  }
  __syncthreads();
  const int j = threadIdx.x;
  if (j >= COLUMNS) return;
  float largest = -INFINITY, total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, reference[w][j]);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (reference[w][j] > -INFINITY) total += partial[w][j] * Exp2(reference[w][j] - largest);
  }
  args.lse[(unit.index * a.slot_count + unit.slot) * COLUMNS + j] =
      largest == -INFINITY ? -INFINITY : largest + log2f(total);
}

// Where the softmax of row j is measured from, so that its shares sum to 1 / rows: of all chunks together. A row that
// is not there, or has no finite score, gets +inf: its shares are 0.
__device__ inline float Denominator(const SumsArgs& args, const SumsUnit& unit, int j) {
  const VerticalSlashShape& a = args.shape;
  const int rows = min(a.rows, unit.sequence.q_len);
  if (unit.first_row + j >= rows) return INFINITY;
  const int chunks = a.by_chunk(unit.sequence.k_len + a.chunk - 1);
  const float* const lse = args.lse + (unit.index * a.slot_count + unit.first_slot) * a.columns + j;
  float largest = -INFINITY, total = 0;
#pragma unroll 8
  for (int i = 0; i < chunks; ++i) largest = fmaxf(largest, lse[i * a.columns]);
  if (largest == -INFINITY) return INFINITY;
#pragma unroll 8
  for (int i = 0; i < chunks; ++i) total += Exp2(lse[i * a.columns] - largest);
  return largest + log2f(total) + log2f(static_cast<float>(rows));
}

template <class PRODUCT, typename T, int PANELS, int COLUMNS>
__global__ void __launch_bounds__(kPanelThreads, PANELS == 4     ? 1
                                                 : COLUMNS == 64 ? 3
                                                                 : 2)
    ShareSumsKernel(const __grid_constant__ SumsArgs args) {
  extern __shared__ char raw[];
  __shared__ float denominator[COLUMNS];
  const VerticalSlashShape& a = args.shape;
  SumsUnit unit;
  if (!PlaceUnit(args, unit)) return;
  char* const memory = AlignedPanels(raw);
  SumsProduct<PRODUCT, T, PANELS, COLUMNS> product(a, unit, memory);
  float* const shares = reinterpret_cast<float*>(memory + product.kBytes);
  if (threadIdx.x < COLUMNS) denominator[threadIdx.x] = Denominator(args, unit, threadIdx.x);

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, pair = 2 * (lane % 4);
  const int key = 16 * warp + lane / 4; // of the step, and the one 8 on
  constexpr int kPitch = SharePitch(COLUMNS);
  for (int i = threadIdx.x; i < kShareRows * kPitch; i += kPanelThreads)
    shares[i] = 0; // places that no key reaches stay so
  float2* const place = reinterpret_cast<float2*>(shares + (8 * warp + lane / 4) * kPitch + key + pair);
  // This thread adds up distances `from`, and 64 and 128 on, in half of the rows of shares.
  const int from = 16 * warp + lane % 16;
  const float* const column_of = shares + lane / 16 * (kShareRows / 2 * kPitch) + from;
  constexpr int kTurns = COLUMNS == 64 ? 2 : 3;
  float carry[3] = {}; // of the distances `from` of the steps to come
  const int64_t slot = unit.index * a.slot_count + unit.slot;
  float* const column = args.vertical_sums + slot * a.chunk;
  float* const diagonal = args.slash_sums + slot * (a.chunk + COLUMNS);

  // Shares into shared memory, and their sums by key.
  float d[COLUMNS / 2], by_key[2];
  auto share = [&](int seen, bool careful) {
    by_key[0] = by_key[1] = 0;
    float upper[2] = {}; // of the columns before
#pragma unroll
    for (int c = 0; c < COLUMNS / 8; ++c) {
      const float2 base = *reinterpret_cast<const float2*>(&denominator[8 * c + pair]);
      float x[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float score = d[4 * c + 2 * half + e];
          x[half][e] = Exp2(fmaf(score, a.exponent_scale, e ? -base.y : -base.x));
          if (careful && !(8 * c + pair + e + 8 * half < seen && IsFinite(score * a.exponent_scale))) x[half][e] = 0;
          by_key[half] += x[half][e];
        }
      }
      place[4 * c] = {x[0][0] + upper[0], x[0][1] + upper[1]};
      upper[0] = x[1][0];
      upper[1] = x[1][1];
    }
    place[COLUMNS / 2] = {upper[0], upper[1]};
  };
  auto store = [&](float mine, int at) { // the two halves of the rows meet
    mine += __shfl_xor_sync(~0u, mine, 16);
    if (lane < 16) diagonal[at + from] = mine;
  };

#pragma unroll 1
  for (int step = 0; step < unit.steps; ++step) {
    product.Step(step, d);
    // Put shares into shared memory.
    const int begin = step * kProductRows;
    const bool whole = product.Whole(step);
    if (whole) share(0, false);
    if (!__all_sync(~0u, whole && by_key[0] + by_key[1] < kLargeSum)) {
      share(unit.sequence.k_len - unit.first_row - (unit.begin + begin + key), true);
    }
    // Store sums by key.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      by_key[half] += __shfl_xor_sync(~0u, by_key[half], 1);
      by_key[half] += __shfl_xor_sync(~0u, by_key[half], 2);
      if (lane % 4 == 0) column[begin + key + 8 * half] = by_key[half];
    }
    __syncthreads();
    // Add up by slash.
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
      for (int i = 0; i < kShareRows / 2; ++i) carry[turn] += column_of[i * kPitch + 64 * turn];
    }
    store(carry[0], begin);
    carry[0] = carry[1];
    carry[1] = carry[2];
    carry[2] = 0;
  }
  store(carry[0], unit.steps * kProductRows); // the part past the chunk's end
  if (COLUMNS > 64) store(carry[1], (unit.steps + 1) * kProductRows);
}

using Kernel = void (*)(SumsArgs);

template <class PRODUCT, typename T, int PANELS, int COLUMNS>
cudaError_t LaunchBoth(const SumsArgs& args, int64_t grid, cudaStream_t stream) {
  constexpr int kRows = SumsProduct<PRODUCT, T, PANELS, COLUMNS>::kBytes + kPanelAlign;
  constexpr int kVerticalSlash = kRows + kShareRows * SharePitch(COLUMNS) * 4;
  const auto launch = [&](Kernel kernel, int bytes) {
    if (cudaError_t e = AllowSharedOnly(kernel, bytes)) return e;
    kernel<<<static_cast<unsigned>(grid), kPanelThreads, static_cast<size_t>(bytes), stream>>>(args);
    return cudaGetLastError();
  };
  if (cudaError_t e = launch(RowSumsKernel<PRODUCT, T, PANELS, COLUMNS>, kRows)) return e;
  return launch(ShareSumsKernel<PRODUCT, T, PANELS, COLUMNS>, kVerticalSlash);
}

template <class PRODUCT, typename T, int PANELS>
cudaError_t LaunchColumns(const SumsArgs& args, int64_t grid, cudaStream_t stream) {
  return args.shape.columns == 64 ? LaunchBoth<PRODUCT, T, PANELS, 64>(args, grid, stream)
                                  : LaunchBoth<PRODUCT, T, PANELS, 128>(args, grid, stream);
}

template <class PRODUCT, typename T>
cudaError_t LaunchPanels(const SumsArgs& args, int64_t grid, cudaStream_t stream) {
  const int head_dim = args.shape.d.p.head_dim;
  return head_dim <= 64    ? LaunchColumns<PRODUCT, T, 1>(args, grid, stream)
         : head_dim <= 128 ? LaunchColumns<PRODUCT, T, 2>(args, grid, stream)
                           : LaunchColumns<PRODUCT, T, 4>(args, grid, stream);
}

template <class PRODUCT>
cudaError_t LaunchSumsWith(const SumsArgs& args, cudaStream_t stream) {
  const Problem& p = args.shape.d.p;
  const int64_t grid = int64_t{args.shape.slot_count} * p.q_heads * args.shape.parts;
  if (grid > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  return p.q.dtype == FP_BF16 ? LaunchPanels<PRODUCT, __nv_bfloat16>(args, grid, stream)
                              : LaunchPanels<PRODUCT, __half>(args, grid, stream);
}

} // namespace
} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_VERTICAL_SLASH_SUMS_CUH_
