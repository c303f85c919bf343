// The map of a query-aware head: softmax of pooled blocks of query rows against pooled blocks of keys, of which the
// largest entries of all rows together are kept, up to gamma of their sum. The map is never stored: it is N^2 / 2 small
// products of means that lie in L2, so each pass over it computes it again, to the same bits.
//
//     launch     a pass over the map                                 then, by the last CTA of the head
//     pool       (means of blocks of query rows)
//     start      rows' denominators; first digit of every entry      the first digit of the threshold
//     search     second digit; another launch: third                 the next digit; how many of the equal ones fit
//     equal      how many entries of a row equal the threshold      how many of them each row keeps: by row, by block
//     bits       entries above, and the first of the equal ones, as bits of the mask
//
// A CTA is one warpgroup with 64 rows of one head, and steps over the key blocks that they see, 64 at a time: a word of
// the mask. Heads that are not query-aware end at once, so a launch costs them a few microseconds.
#ifndef FLASHPREFILL_CUDA_COMMON_VERTICAL_SLASH_MAP_CUH_
#define FLASHPREFILL_CUDA_COMMON_VERTICAL_SLASH_MAP_CUH_

#include "cuda/common/launch.h"
#include "cuda/common/numbers.cuh"
#include "cuda/common/radix_threshold.cuh"
#include "cuda/common/swizzled_rows.cuh"
#include "cuda/common/vertical_slash/args.h"

namespace flashprefill::cuda {
namespace {

constexpr int kRows = kMapRows;
constexpr int kWarps = kPanelThreads / 32;
constexpr int kColumns = 8;      // of a lane that pools: 16 bytes
constexpr int kFlushSteps = 512; // after which no sum of 32 bits can have passed its range

enum MapPass { kStart, kSearch, kEqual, kBits };

__device__ inline int QueryBlocks(const VerticalSlashShape& a, const DeviceSequence& s) {
  return a.rules.by_block(s.q_len + a.rules.block_size - 1);
}

__device__ inline int RowBase(const VerticalSlashShape& a, int b) { // of the map
  return a.rules.by_block(QueryBegin(a.d.p, b)) + b;
}

// A warp: the mean of one block of query rows, rounded once. The first of a head also clears the sums of later passes.
template <typename T>
__global__ void __launch_bounds__(kPanelThreads) PoolRowsKernel(const __grid_constant__ MapArgs args) {
  const VerticalSlashShape& a = args.shape;
  const Problem& p = a.d.p;
  const int slot = blockIdx.x * kWarps + threadIdx.x / 32, head = blockIdx.y, lane = threadIdx.x % 32;
  if (slot >= args.row_room) return;
  const DeviceSequence s = SequenceAt(a.d, SequenceOfSlot(p.batch, slot, [&](int b) { return RowBase(a, b); }));
  const int row = slot - RowBase(a, s.index), size = a.rules.block_size;
  const int64_t index = s.index * p.q_heads + head;
  if (row < 0 || row >= QueryBlocks(a, s) || KeepsEverything(a, s) || !args.aware[index]) return;
  if (row == 0) {
    if (lane == 0) args.state[index] = MapState{};
    for (int i = lane; i < kRadixBins; i += 32)
      args.counts[index * kRadixBins + i] = 0, args.rests[index * kRadixBins + i] = 0;
  }

  int lanes = 4;
  while (lanes * kColumns < p.head_dim) lanes *= 2;
  const int column = lane % lanes * kColumns, group = lane / lanes, groups = 32 / lanes;
  const int begin = row * size, count = min(size, s.q_len - begin);
  float sum[kColumns] = {};
  if (column < p.head_dim) {
    const T* const from = static_cast<const T*>(p.q.data) + RowOffsetAt(p, p.q.stride, s, begin, head) + column;
#pragma unroll 8
    for (int i = group; i < count; i += groups) {
      const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from + i * p.q.stride[1]));
      const T* const value = reinterpret_cast<const T*>(&raw);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) sum[k] += ToFloat(value[k]);
    }
  }
  T* const to = static_cast<T*>(args.q_means) + (head * args.row_room + slot) * args.pitch + column;
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    for (int offset = lanes; offset < 32; offset *= 2) sum[k] += __shfl_xor_sync(~0u, sum[k], offset);
    if (group == 0 && column < p.head_dim) to[k] = T(__fdiv_rn(sum[k], static_cast<float>(count)));
  }
}

// A CTA's rows, and the product of a step.
template <class PRODUCT, typename T, int PANELS>
struct MapPanel {
  static constexpr int kStageBytes = kPanelBytes<PANELS, kRows>;    // 64 rows of either side
  static constexpr int kStages = PRODUCT::template kStages<PANELS>; // of keys
  static constexpr int kBytes = (1 + kStages) * kStageBytes;

  const MapArgs& args;
  const VerticalSlashShape& a;
  DeviceSequence s;
  int head, first, rows; // of the map
  int64_t index;         // (sequence, head)
  int64_t row;           // of the map's arrays
  const T *keys, *queries;
  char* shared;

  __device__ MapPanel(const MapArgs& arguments) : args(arguments), a(arguments.shape) {}

  __device__ int SeenBy(int r) const { // key blocks
    return a.rules.by_block(s.prefix + min((r + 1) * a.rules.block_size, s.q_len) - 1) + 1;
  }
  __device__ int PanelBase(int b) const { return args.by_panel(QueryBegin(a.d.p, b)) + b; }

  __device__ bool Place(char* memory) {
    const Problem& p = a.d.p;
    const int slot = gridDim.x - 1 - blockIdx.x; // the last rows see the most
    head = blockIdx.y;
    s = SequenceAt(a.d, SequenceOfSlot(p.batch, slot, [&](int b) { return PanelBase(b); }));
    first = (slot - PanelBase(s.index)) * kRows;
    rows = min(kRows, QueryBlocks(a, s) - first);
    index = s.index * p.q_heads + head;
    if (first < 0 || rows <= 0 || KeepsEverything(a, s) || !args.aware[index]) return false;
    row = head * args.row_room + RowBase(a, s.index) + first;
    queries = static_cast<const T*>(args.q_means) + row * args.pitch;
    const int kv = head / (p.q_heads / p.kv_heads);
    const int64_t base = kv * args.mean_rows + MeanBase(p, s, a.rules.block_size);
    keys = static_cast<const T*>(args.k_means) + base * args.pitch;
    shared = memory;
    CopyRows<PANELS, kRows>(shared, p.head_dim, queries,
                            [&](int r) { return r < rows ? queries + r * args.pitch : nullptr; });
    return true;
  }

  __device__ void CopyKeys(int step) {
    const int blocks = s.Blocks(a.rules);
    CopyRows<PANELS, kRows>(shared + (1 + step % kStages) * kStageBytes, a.d.p.head_dim, keys, [&](int c) {
      const int block = step * kRows + c;
      return block < blocks ? keys + int64_t{block} * args.pitch : nullptr;
    });
  }

  // body(step, product) for all key blocks that some row sees.
  template <typename Body>
  __device__ void ForSteps(Body&& body) {
    const int steps = (SeenBy(first + rows - 1) + kRows - 1) / kRows;
    __syncthreads(); // a loop before this one may still read
    CopyKeys(0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      float d[kRows / 2];
      AsyncCopyWaitAll();
      PRODUCT::Fence();
      __syncthreads();
      const char* const keys_of_step = shared + (1 + step % kStages) * kStageBytes;
      const auto next = [&] {
        if (step + 1 < steps) CopyKeys(step + 1);
      };
      if constexpr (kStages > 1) {
        PRODUCT::template Multiply<T, PANELS, kRows>(d, keys_of_step, shared, next);
      } else {
        PRODUCT::template Multiply<T, PANELS, kRows>(d, keys_of_step, shared, [] {});
        __syncthreads();
        next();
      }
      body(step, d);
    }
  }
};

struct MapShared {
  int seen[kRows];
  float lse[kRows];
  float2 partial[kWarps][kRows]; // largest, and sum of exponentials
  RadixBins bins;
  RadixScan<kPanelThreads> scan;
  RadixThreshold threshold;
  uint32_t above[kRows][2], equal[kRows][2], number[kRows];
  bool last;
};

__device__ inline float2 JoinSums(float2 x, float2 y) {
  const float largest = fmaxf(x.x, y.x), base = largest == -INFINITY ? 0.f : largest;
  return {largest, x.y * Exp2(x.x - base) + y.y * Exp2(y.x - base)};
}

// Entry i of a thread: its row of D (a key block) and column (a row of the map).
__device__ __forceinline__ int KeyOfEntry(int i) {
  return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
}
__device__ __forceinline__ int RowOfEntry(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

// True for the CTA that is the last of its head to come here: then the sums of the others are complete.
__device__ inline bool IsLast(MapState& state, int panels, MapShared& shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.last = atomicAdd(&state.arrived, 1) + 1 == static_cast<uint32_t>(panels);
    if (shared.last) state.arrived = 0;
    __threadfence();
  }
  __syncthreads();
  return shared.last;
}

// One pass over the map by one CTA: its 64 rows, and what it knows of the head.
template <class PRODUCT, typename T, int PANELS>
struct MapRun {
  const MapArgs& args;
  const VerticalSlashShape& a;
  MapPanel<PRODUCT, T, PANELS>& panel;
  MapShared& shared;
  MapState& state;
  int level;       // of the digit that is searched for
  bool all;        // every entry is kept
  uint32_t prefix; // digits found so far
  int panels;      // CTAs of the head
  double limit;    // of the sum of kept entries
  int j;           // this thread

  // body(entry, share) for the entries of a step that are seen.
  template <typename Body>
  __device__ __forceinline__ void ForEntries(int step, const float (&d)[kRows / 2], Body&& body) const {
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) {
      if (step * kRows + KeyOfEntry(i) < shared.seen[RowOfEntry(i)]) {
        const float score = d[i] * a.exponent_scale;
        body(i, fabsf(score) < INFINITY ? Exp2(score - shared.lse[RowOfEntry(i)]) : 0.f);
      }
    }
  }

  __device__ __forceinline__ void Denominators() const {
    float2 sum[kRows / 4];
#pragma unroll
    for (float2& x : sum) x = {-INFINITY, 0};
    panel.ForSteps([&](int step, const float(&d)[kRows / 2]) {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        const float score = d[i] * a.exponent_scale;
        if (step * kRows + KeyOfEntry(i) < shared.seen[RowOfEntry(i)] && fabsf(score) < INFINITY) {
          float2& x = sum[i / 4 * 2 + i % 2];
          x = JoinSums(x, {score, 1});
        }
      }
    });
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) {
        const float2 other = {__shfl_xor_sync(~0u, sum[i].x, offset), __shfl_xor_sync(~0u, sum[i].y, offset)};
        sum[i] = JoinSums(sum[i], other);
      }
      if (j % 32 < 4) shared.partial[j / 32][RowOfEntry(i / 2 * 4 + i % 2)] = sum[i];
    }
    __syncthreads();
    if (j < kRows) {
      const float2 total = JoinSums(JoinSums(shared.partial[0][j], shared.partial[1][j]),
                                    JoinSums(shared.partial[2][j], shared.partial[3][j]));
      shared.lse[j] = total.y > 0 ? total.x + log2f(total.y) : INFINITY;
      if (j < panel.rows) args.lse[panel.row + j] = shared.lse[j];
    }
    __syncthreads();
  }

  // Rows of the mask that belong to the panel's rows.
  template <typename Body>
  __device__ __forceinline__ void ForTiles(int r, Body&& body) const {
    const int size = a.rules.block_size, last = min((r + 1) * size, panel.s.q_len) - 1;
    for (int m = a.rules.by_tile(r * size); m <= a.rules.by_tile(last); ++m) {
      const int tile_row = panel.s.TileBase(a.rules) + m;
      if (tile_row < a.rules.tile_rows)
        body(args.bits + (int64_t{panel.head} * a.rules.tile_rows + tile_row) * args.words);
    }
  }

  __device__ __forceinline__ void ClearMask() const {
    for (int r = panel.first; r < panel.first + panel.rows; ++r) {
      ForTiles(r, [&](uint64_t* words) {
        for (int w = j; w < args.words; w += kPanelThreads) words[w] = 0;
      });
    }
  }

  __device__ __forceinline__ void Flush() const {
    __syncthreads();
    for (int i = j; i < kRadixBins; i += kPanelThreads) {
      if (shared.bins.count[i] == 0) continue;
      atomicAdd(&args.counts[panel.index * kRadixBins + i], shared.bins.count[i]);
      const uint64_t rest = (uint64_t{shared.bins.high[i]} << 10) + shared.bins.low[i];
      atomicAdd(reinterpret_cast<unsigned long long*>(&args.rests[panel.index * kRadixBins + i]), rest);
      shared.bins.count[i] = shared.bins.low[i] = shared.bins.high[i] = 0;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void Digits() const {
    for (int i = j; i < kRadixBins; i += kPanelThreads)
      shared.bins.count[i] = shared.bins.low[i] = shared.bins.high[i] = 0;
    __syncthreads();
    panel.ForSteps([&](int step, const float(&d)[kRows / 2]) {
      ForEntries(step, d, [&](int, float x) { AddToBins(shared.bins, level, prefix, RadixOrder(x)); });
      if (step % kFlushSteps == kFlushSteps - 1) Flush();
    });
    Flush();
  }

  __device__ __forceinline__ void NextDigit() const {
    if (!IsLast(state, panels, shared)) return;
    if (j == 0)
      shared.threshold = level == 0 ? RadixThreshold::Start() : RadixThreshold{state.sum, state.above, prefix, true};
    __syncthreads();
    uint32_t* const counts = args.counts + panel.index * kRadixBins;
    uint64_t* const rests = args.rests + panel.index * kRadixBins;
    Descend<kPanelThreads>(shared.threshold, level, limit, shared.scan, [&](int digit, uint32_t& count, double& mass) {
      count = __ldcg(&counts[digit]);
      mass = MassOfBin(level, prefix, digit, count, __ldcg(&rests[digit]));
      counts[digit] = 0;
      rests[digit] = 0;
    });
    if (j == 0) {
      state.sum = shared.threshold.sum;
      state.above = shared.threshold.above;
      state.prefix = shared.threshold.prefix;
      state.passes = shared.threshold.passes;
      state.equal = level == kRadixLevels - 1 ? shared.threshold.Equal(limit, false) : 0;
    }
  }

  // Equal ones go by row: those left go to this row, as far as it has any.
  __device__ __forceinline__ void EqualOfRows() const {
    panel.ForSteps([&](int step, const float(&d)[kRows / 2]) {
      ForEntries(step, d, [&](int i, float x) {
        if (RadixOrder(x) == prefix) atomicAdd(&shared.number[RowOfEntry(i)], 1);
      });
    });
    __syncthreads();
    if (j < panel.rows) args.equal[panel.row + j] = shared.number[j];
    if (!IsLast(state, panels, shared) || j >= 32) return;
    uint32_t* const equal = args.equal + (panel.row - panel.first);
    uint32_t left = state.equal;
    for (int begin = 0; begin < QueryBlocks(a, panel.s); begin += 32) {
      const int r = begin + j;
      const uint32_t own = r < QueryBlocks(a, panel.s) ? __ldcg(&equal[r]) : 0;
      uint32_t up_to = own;
      for (int offset = 1; offset < 32; offset *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, up_to, offset);
        if (j >= offset) up_to += other;
      }
      const uint32_t before = min(up_to - own, left);
      if (r < QueryBlocks(a, panel.s)) equal[r] = min(own, left - before);
      left -= min(left, __shfl_sync(~0u, up_to, 31));
    }
  }

  __device__ __forceinline__ void Bits() const {
    panel.ForSteps([&](int step, const float(&d)[kRows / 2]) {
      if (j < kRows) shared.above[j][0] = shared.above[j][1] = shared.equal[j][0] = shared.equal[j][1] = 0;
      __syncthreads();
      ForEntries(step, d, [&](int i, float x) {
        const uint32_t order = RadixOrder(x);
        const int key = KeyOfEntry(i), r = RowOfEntry(i);
        if (all || order > prefix) {
          atomicOr(&shared.above[r][key / 32], 1u << (key % 32));
        } else if (order == prefix) {
          atomicOr(&shared.equal[r][key / 32], 1u << (key % 32));
        }
      });
      __syncthreads();
      if (j < panel.rows) {
        uint64_t word = uint64_t{shared.above[j][1]} << 32 | shared.above[j][0];
        uint64_t equal = uint64_t{shared.equal[j][1]} << 32 | shared.equal[j][0];
        for (; shared.number[j] > 0 && equal; equal &= equal - 1, --shared.number[j]) word |= equal & (0 - equal);
        if (word) {
          ForTiles(panel.first + j,
                   [&](uint64_t* words) { atomicOr(reinterpret_cast<unsigned long long*>(words + step), word); });
        }
      }
    });
  }
};

template <class PRODUCT, typename T, int PANELS, MapPass PASS>
__global__ void __launch_bounds__(kPanelThreads) MapKernel(const __grid_constant__ MapArgs args, int level) {
  extern __shared__ char raw[];
  __shared__ MapShared shared;
  MapPanel<PRODUCT, T, PANELS> panel(args);
  if (!panel.Place(AlignedPanels(raw))) return;
  const VerticalSlashShape& a = args.shape;
  MapState& state = args.state[panel.index];
  if ((PASS == kSearch && !state.passes) || (PASS == kEqual && (!state.passes || state.equal == 0))) return;
  const bool all = PASS == kStart ? args.gamma >= 1 : !state.passes;
  const uint32_t prefix = PASS == kStart ? 0 : state.prefix;
  const int panels = (QueryBlocks(a, panel.s) + kRows - 1) / kRows;
  const double limit = static_cast<double>(args.gamma) * QueryBlocks(a, panel.s);
  const int j = threadIdx.x;
  if (j < kRows) {
    shared.seen[j] = j < panel.rows ? panel.SeenBy(panel.first + j) : 0;
    shared.lse[j] = PASS != kStart && j < panel.rows ? args.lse[panel.row + j] : INFINITY;
    shared.number[j] = PASS == kBits && j < panel.rows && !all && state.equal > 0 ? args.equal[panel.row + j] : 0;
  }
  __syncthreads();

  const MapRun<PRODUCT, T, PANELS> run{args, a, panel, shared, state, level, all, prefix, panels, limit, j};
  if constexpr (PASS == kStart) {
    run.ClearMask();
    if (all) {
      if (j == 0) state.passes = 0;
      return;
    }
    run.Denominators();
  }
  if constexpr (PASS == kStart || PASS == kSearch) {
    run.Digits();
    run.NextDigit();
  } else if constexpr (PASS == kEqual) {
    run.EqualOfRows();
  } else {
    run.Bits();
  }
}

template <class PRODUCT, typename T, int PANELS, MapPass PASS>
cudaError_t LaunchPass(const MapArgs& args, int level, cudaStream_t stream) {
  constexpr int kBytes = MapPanel<PRODUCT, T, PANELS>::kBytes + kPanelAlign;
  const auto kernel = MapKernel<PRODUCT, T, PANELS, PASS>;
  if (cudaError_t e = AllowSharedOnly(kernel, kBytes)) return e;
  const dim3 grid(static_cast<unsigned>(args.panel_room), static_cast<unsigned>(args.shape.d.p.q_heads));
  kernel<<<grid, kPanelThreads, kBytes, stream>>>(args, level);
  return cudaGetLastError();
}

template <class PRODUCT, typename T, int PANELS>
cudaError_t LaunchPasses(const MapArgs& args, cudaStream_t stream) {
  if (cudaError_t e = LaunchPass<PRODUCT, T, PANELS, kStart>(args, 0, stream)) return e;
  if (args.gamma < 1) {
    if (cudaError_t e = LaunchPass<PRODUCT, T, PANELS, kSearch>(args, 1, stream)) return e;
    if (cudaError_t e = LaunchPass<PRODUCT, T, PANELS, kSearch>(args, 2, stream)) return e;
    if (cudaError_t e = LaunchPass<PRODUCT, T, PANELS, kEqual>(args, 0, stream)) return e;
  }
  return LaunchPass<PRODUCT, T, PANELS, kBits>(args, 0, stream);
}

template <class PRODUCT, typename T>
cudaError_t LaunchAll(const MapArgs& args, cudaStream_t stream) {
  const Problem& p = args.shape.d.p;
  const dim3 grid(static_cast<unsigned>(DivUp<int64_t>(args.row_room, kWarps)), static_cast<unsigned>(p.q_heads));
  PoolRowsKernel<T><<<grid, kPanelThreads, 0, stream>>>(args);
  if (cudaError_t e = cudaGetLastError()) return e;
  return p.head_dim <= 64    ? LaunchPasses<PRODUCT, T, 1>(args, stream)
         : p.head_dim <= 128 ? LaunchPasses<PRODUCT, T, 2>(args, stream)
                             : LaunchPasses<PRODUCT, T, 4>(args, stream);
}

template <class PRODUCT>
cudaError_t LaunchMapWith(const MapArgs& args, cudaStream_t stream) {
  return args.shape.d.p.q.dtype == FP_BF16 ? LaunchAll<PRODUCT, __nv_bfloat16>(args, stream)
                                           : LaunchAll<PRODUCT, __half>(args, stream);
}

} // namespace
} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_VERTICAL_SLASH_MAP_CUH_
