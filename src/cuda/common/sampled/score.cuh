// The exact softmax of sampled rows, by key block: a CTA is one warpgroup with a panel of 64 rows of one head and a
// chunk of keys, for every GPU since Ampere.
//
//     D[64 keys, 64 rows] = K[64, d] . Q[rows, d]^T
//
// A warp adds up exponentials of its 16 keys of each step (key_product.cuh) until a block ends; its 8 lanes of a row
// then meet, and at the next step's barrier the four warps. Energies are logarithms, so references need not agree. What
// a chunk has made waits in shared memory, to be stored row by row in whole lines. CTAs that run at a time share a KV
// head and a chunk of keys, which then lies in L2.
#ifndef FLASHPREFILL_CUDA_COMMON_SAMPLED_SCORE_CUH_
#define FLASHPREFILL_CUDA_COMMON_SAMPLED_SCORE_CUH_

#include <limits>

#include "cuda/common/key_product.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/sampled/args.h"

namespace flashprefill::cuda {
namespace {

constexpr int kRows = kSampledRows;
constexpr int kWarps = kPanelThreads / 32;
constexpr int kEnergyPitch = kMostChunkParts + 1; // floats per row: rows begin on different banks

struct SampledShared {
  float reference[kWarps][kRows];
  float part[2][kWarps][kRows];      // energies of the warps, of the last block that ended and the one before
  float energy[kRows][kEnergyPitch]; // of the chunk's parts
  int row[kRows], limit[kRows];      // the query row, and how many keys it sees; -1 and 0: none
};

struct SampledUnit : KeySpan {
  int head, panel; // of all sequences
  int first_part, parts;
  int least, most; // limits of the panel's rows
};

// The panel's rows, by all threads, and the keys of this CTA. False: nothing to do.
__device__ __forceinline__ bool PlaceSample(const SampledShape& a, SampledShared& shared, SampledUnit& unit) {
  const Problem& p = a.d.p;
  const int group = p.q_heads / p.kv_heads;
  const int of_head = a.by_group(static_cast<int>(blockIdx.x)),
            in_group = static_cast<int>(blockIdx.x) - of_head * group;
  const int of_panel = a.by_round(of_head), panel = of_head - of_panel * (a.end_panel - a.first_panel);
  unit.kv = a.by_chunks(of_panel);
  const int chunk = of_panel - unit.kv * a.chunks;
  unit.head = unit.kv * group + in_group;
  unit.panel = a.first_panel + panel;
  const DeviceSequence s = SequenceAt(a.d, SequenceOfSlot(p.batch, unit.panel, [&](int b) { return PanelBase(a, b); }));
  unit.sequence = s;
  const int in_sequence = unit.panel - PanelBase(a, s.index);
  const RowSample sample = SampleOf(a, s);
  if (in_sequence < 0 || in_sequence >= PanelsOf(a, sample) || KeepsEverything(p, a.rules, s)) return false;
  if (threadIdx.x < kRows) {
    const int row = SampledRow(a, sample, in_sequence * kRows + threadIdx.x);
    shared.row[threadIdx.x] = row;
    shared.limit[threadIdx.x] = row < 0 ? 0 : s.prefix + row + 1;
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const auto least_of = [](int limit) { return limit > 0 ? limit : std::numeric_limits<int>::max(); };
  unit.least = __reduce_min_sync(~0u, min(least_of(shared.limit[lane]), least_of(shared.limit[lane + 32])));
  unit.most = __reduce_max_sync(~0u, max(shared.limit[lane], shared.limit[lane + 32]));
  unit.first_part = chunk * a.chunk_parts;
  unit.begin = unit.first_part * a.part_keys;
  const int keys = min(unit.most - unit.begin, a.chunk_parts * a.part_keys);
  if (keys <= 0) return false;
  unit.parts = (keys + a.part_keys - 1) / a.part_keys;
  unit.steps = (keys + kProductRows - 1) / kProductRows;
  return true;
}

// PARTS_OF_16: a part is a warp's keys of a step, else some steps.
template <class PRODUCT, typename T, int PANELS, bool PARTS_OF_16>
__global__ void __launch_bounds__(kPanelThreads, PANELS == 4 ? 1 : 3)
    SampledScoreKernel(const __grid_constant__ SampledShape a) {
  using Product = KeyProduct<PRODUCT, T, PANELS, kRows>;
  extern __shared__ char raw[];
  char* const memory = AlignedPanels(raw);
  SampledShared& shared = *reinterpret_cast<SampledShared*>(memory + Product::kBytes);
  const Problem& p = a.d.p;
  SampledUnit unit;
  if (!PlaceSample(a, shared, unit)) return;
  Product product(p, a.by_page, unit, memory, [&](int r) -> const T* {
    const int row = shared.row[r];
    if (row < 0) return nullptr;
    return static_cast<const T*>(p.q.data) + RowOffsetAt(p, p.q.stride, unit.sequence, row, unit.head);
  });
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  RowSums<kRows> sums{shared.reference[warp], a.exponent_scale};
  sums.Start();

  // Energies of a block from those of the four warps.
  const auto join = [&](int part) {
    const int row = threadIdx.x;
    if (row >= kRows) return;
    float largest = -INFINITY, sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, shared.part[part % 2][w][row]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += Exp2(shared.part[part % 2][w][row] - largest);
    shared.energy[row][part] = largest == -INFINITY ? -INFINITY : __log2f(sum) + largest;
  };
  const int part_steps = PARTS_OF_16 ? 1 : a.part_keys / kProductRows;
  int in_part = 0, part = 0, joined = 0;
#pragma unroll 1
  for (int step = 0; step < unit.steps; ++step) {
    float d[kRows / 2];
    product.Step(step, d);
    if (!PARTS_OF_16 && joined < part) join(joined++); // what warps have stored before the barrier
    const int first = unit.begin + step * kProductRows, key = first + 16 * warp + lane / 4;
    sums.Add(d, first + kProductRows <= unit.least, [&](int j, int half) { return key + 8 * half < shared.limit[j]; });
    if constexpr (PARTS_OF_16) {
      StoreLogSums(sums, &shared.energy[0][kWarps * step + warp], kEnergyPitch);
    } else if (++in_part == part_steps || step + 1 == unit.steps) {
      StoreLogSums(sums, shared.part[part % 2][warp], 1);
      in_part = 0;
      ++part;
    }
  }
  __syncthreads();
  if (!PARTS_OF_16 && joined < part) join(joined);
  __syncthreads();

  // Store whole runs of rows.
  const int64_t slot = int64_t{unit.head} * (a.end_panel - a.first_panel) + unit.panel - a.first_panel;
  float* const to = a.energies + slot * kRows * a.part_stride + unit.first_part;
  for (int row = warp; row < kRows; row += kWarps) {
    if (lane < unit.parts) to[row * a.part_stride + lane] = shared.energy[row][lane];
  }
}

template <class PRODUCT, typename T, int PANELS, bool PARTS_OF_16>
cudaError_t LaunchSampledScoreOf(const SampledShape& a, cudaStream_t stream) {
  constexpr int kBytes = KeyProduct<PRODUCT, T, PANELS, kRows>::kBytes + sizeof(SampledShared) + kPanelAlign;
  const auto kernel = SampledScoreKernel<PRODUCT, T, PANELS, PARTS_OF_16>;
  if (cudaError_t e = AllowSharedOnly(kernel, kBytes)) return e;
  const int64_t grid = int64_t{a.d.p.q_heads} * (a.end_panel - a.first_panel) * a.chunks;
  if (grid > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(grid), kPanelThreads, kBytes, stream>>>(a);
  return cudaGetLastError();
}

template <class PRODUCT, typename T, int PANELS>
cudaError_t LaunchSampledScoreParts(const SampledShape& a, cudaStream_t stream) {
  return a.part_keys == 16 ? LaunchSampledScoreOf<PRODUCT, T, PANELS, true>(a, stream)
                           : LaunchSampledScoreOf<PRODUCT, T, PANELS, false>(a, stream);
}

template <class PRODUCT, typename T>
cudaError_t LaunchSampledScorePanels(const SampledShape& a, cudaStream_t stream) {
  const int head_dim = a.d.p.head_dim;
  return head_dim <= 64    ? LaunchSampledScoreParts<PRODUCT, T, 1>(a, stream)
         : head_dim <= 128 ? LaunchSampledScoreParts<PRODUCT, T, 2>(a, stream)
                           : LaunchSampledScoreParts<PRODUCT, T, 4>(a, stream);
}

template <class PRODUCT>
cudaError_t LaunchSampledScoreWith(const SampledShape& a, cudaStream_t stream) {
  return a.d.p.q.dtype == FP_BF16 ? LaunchSampledScorePanels<PRODUCT, __nv_bfloat16>(a, stream)
                                  : LaunchSampledScorePanels<PRODUCT, __half>(a, stream);
}

} // namespace
} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_SAMPLED_SCORE_CUH_
