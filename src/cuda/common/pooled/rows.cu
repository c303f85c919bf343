// Runs of rows, a warp for each: the means of query rows, and for SpargeAttn how alike the rows of a tile and the keys
// of a block are. The pass is bound by memory: 16 bytes per lane, eight loads in flight before the first is used, and
// neighbouring warps take neighbouring heads, so that whole rows of tokens are read. A row's lanes meet once for its
// length, and all lanes once at the end of the run, so nothing goes through shared memory.
//
// The mean key of a sequence must be known before its blocks are judged, so K is read twice: the pooling pass comes
// first, and leaves means that are not rounded.
#include <limits>

#include "cuda/common/energies/pool_rows.cuh"
#include "cuda/common/pooled/args.h"
#include "cuda/common/tensor_access.h"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kInFlight = 8;
constexpr int kCenterThreads = 1024;

enum RunJob {
  kQueryRows,       // means
  kQuerySimilarity, // means and similarity
  kKeySimilarity
};

struct Run {
  DeviceSequence sequence;
  int head, begin, count; // rows; a count of 0: nothing to do
  int64_t index;          // of the results
};

__device__ Run QueryRun(const PooledShape& a, int number) {
  const Problem& p = a.d.p;
  const int slot = a.by_heads(number);
  Run run;
  run.head = number - slot * p.q_heads;
  run.sequence = SequenceAt(a.d, SequenceOfSlot(p.batch, slot, [&](int b) { return RowBase(a, b); }));
  run.begin = (slot - RowBase(a, run.sequence.index)) * a.row_tokens;
  run.count = min(a.row_tokens, run.sequence.q_len - run.begin);
  run.index = int64_t{run.head} * a.row_room + slot;
  const bool wanted = slot < a.row_room && run.begin >= 0 && !IsSkipped(a, run.head);
  if (!wanted || KeepsEverything(p, a.rules, run.sequence)) run.count = 0;
  return run;
}

__device__ Run KeyRun(const PooledShape& a, int number) {
  const Problem& p = a.d.p;
  const TileRules& r = a.rules;
  const int slot = a.by_kv(number);
  Run run;
  run.head = number - slot * p.kv_heads;
  const int b = PackedKeys(p)
                    ? SequenceOfSlot(p.batch, slot, [&](int i) { return r.by_block(KeyBegin(p, i)) + i; }) // MeanBase
                    : min(a.by_blocks(slot), p.batch - 1);
  run.sequence = SequenceAt(a.d, b);
  run.begin = static_cast<int>(slot - MeanBase(p, run.sequence, r.block_size)) * r.block_size;
  run.count = min(r.block_size, run.sequence.k_len - run.begin);
  run.index = run.head * a.mean_rows + slot;
  if (slot >= a.mean_rows || run.begin < 0 || run.sequence.q_len == 0 || KeepsEverything(p, r, run.sequence)) {
    run.count = 0;
  }
  return run;
}

template <typename T, bool OF_KEYS>
__device__ __forceinline__ const T* RowOf(const PooledShape& a, const Run& run, int row) {
  const Problem& p = a.d.p;
  const int at = run.begin + row;
  if constexpr (!OF_KEYS) {
    return static_cast<const T*>(p.q.data) + RowOffsetAt(p, p.q.stride, run.sequence, at, run.head);
  } else if (p.block_table) {
    const int index = a.by_page(at);
    return static_cast<const T*>(p.k.data) + PageAt(p, run.sequence.index, index) * p.k.stride[0] +
           (at - index * p.page_size) * p.k.stride[1] + run.head * p.k.stride[2];
  } else {
    return static_cast<const T*>(p.k.data) + KeyOffsetAt(p, p.k.stride, run.sequence, at, run.head);
  }
}

// The sums of a run's rows and of their unit vectors: of the eight columns of a lane, complete in all lanes.
struct RunSums {
  float rows[kColumns], units[kColumns];
};

template <typename T, bool VECTOR, RunJob JOB>
__device__ __forceinline__ RunSums AddUpRun(const PooledShape& a, const Run& run, int lanes, const float* center_at) {
  constexpr bool kOfKeys = JOB == kKeySimilarity;
  const Problem& p = a.d.p;
  const Tensor& tensor = kOfKeys ? p.k : p.q;
  const int lane = threadIdx.x % 32, column = (lane & (lanes - 1)) * kColumns;
  const int group = lane / lanes, groups = 32 / lanes;
  const bool active = column < a.pitch;
  float center[kColumns] = {};
  if (JOB == kKeySimilarity && active) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) center[k] = center_at[column + k];
  }
  RunSums sums{};
#pragma unroll 1
  for (int begin = 0; begin < run.count; begin += kInFlight * groups) {
    Chunk<T> held[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int row = begin + i * groups + group;
      held[i].raw = uint4{0, 0, 0, 0};
      if (active && row < run.count) {
        held[i] = LoadChunk<T, VECTOR>(RowOf<T, kOfKeys>(a, run, row), column, p.head_dim, tensor.stride[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const bool real = active && begin + i * groups + group < run.count;
      float x[kColumns], squared = 0;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        x[k] = ToFloat(held[i].value[k]);
        sums.rows[k] += x[k];
        if constexpr (JOB == kKeySimilarity) x[k] = real ? x[k] - center[k] : 0.f;
        squared = fmaf(x[k], x[k], squared);
      }
      if constexpr (JOB != kQueryRows) {
        for (int offset = lanes / 2; offset; offset /= 2) squared += __shfl_xor_sync(~0u, squared, offset);
        const float unit = squared == 0 ? 0.f : rsqrtf(squared); // NaN stays
#pragma unroll
        for (int k = 0; k < kColumns; ++k) sums.units[k] = fmaf(x[k], unit, sums.units[k]);
      }
    }
  }
  for (int offset = lanes; offset < 32; offset *= 2) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      sums.rows[k] += __shfl_xor_sync(~0u, sums.rows[k], offset);
      if constexpr (JOB != kQueryRows) sums.units[k] += __shfl_xor_sync(~0u, sums.units[k], offset);
    }
  }
  return sums;
}

template <typename T, bool VECTOR, RunJob JOB>
__global__ void __launch_bounds__(kThreads) RunKernel(const __grid_constant__ SimilarityArgs args) {
  const PooledShape& a = args.shape;
  const int number = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  const Run run = JOB == kKeySimilarity ? KeyRun(a, number) : QueryRun(a, number);
  if (run.count <= 0) return;
  int lanes = 4; // of a row
  while (lanes * kColumns < a.pitch) lanes *= 2;
  const int64_t center = (int64_t{run.sequence.index} * a.d.p.kv_heads + run.head) * a.pitch;
  const RunSums sums = AddUpRun<T, VECTOR, JOB>(a, run, lanes, JOB == kKeySimilarity ? args.center + center : nullptr);
  const int column = (lane & (lanes - 1)) * kColumns;
  // Write the mean.
  if (JOB != kKeySimilarity && lane < lanes && column < a.pitch) {
    float mean[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) mean[k] = __fdiv_rn(sums.rows[k], static_cast<float>(run.count));
    *reinterpret_cast<uint4*>(static_cast<T*>(a.q_rows) + run.index * a.pitch + column) = Rounded<T>(mean);
  }
  // Judge.
  if constexpr (JOB != kQueryRows) {
    float squared = 0;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) squared = fmaf(sums.units[k], sums.units[k], squared);
    for (int offset = lanes / 2; offset; offset /= 2) squared += __shfl_xor_sync(~0u, squared, offset);
    const float n = static_cast<float>(run.count);
    uint8_t* const similar = JOB == kKeySimilarity ? args.similar_keys : args.similar_rows;
    if (lane == 0) similar[run.index] = squared > args.threshold * n * n;
  }
}

// The mean key of a sequence, by a CTA: threads of a column add up every so many blocks, in double precision.
__global__ void __launch_bounds__(kCenterThreads) CenterKernel(const __grid_constant__ SimilarityArgs args) {
  __shared__ double partial[kCenterThreads];
  const PooledShape& a = args.shape;
  const Problem& p = a.d.p;
  const DeviceSequence s = SequenceAt(a.d, blockIdx.y);
  if (s.q_len == 0 || KeepsEverything(p, a.rules, s)) return;
  int columns = 32;
  while (columns < a.pitch) columns *= 2;
  const int column = threadIdx.x & (columns - 1), group = threadIdx.x / columns, groups = kCenterThreads / columns;
  const int blocks = s.Blocks(a.rules);
  const int64_t first = int64_t{blockIdx.x} * a.mean_rows + MeanBase(p, s, a.rules.block_size);
  double sum = 0;
  if (column < a.pitch) {
#pragma unroll 8
    for (int b = group; b < blocks; b += groups) {
      const int keys = min(a.rules.block_size, s.k_len - b * a.rules.block_size);
      sum += static_cast<double>(args.key_means[(first + b) * a.pitch + column]) * keys;
    }
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (group > 0 || column >= a.pitch) return;
  for (int g = 1; g < groups; ++g) sum += partial[g * columns + column];
  args.center[(int64_t{blockIdx.y} * p.kv_heads + blockIdx.x) * a.pitch + column] =
      static_cast<float>(sum / static_cast<double>(s.k_len));
}

template <RunJob JOB>
cudaError_t LaunchRuns(const SimilarityArgs& args, cudaStream_t stream) {
  const PooledShape& a = args.shape;
  const Problem& p = a.d.p;
  const int64_t runs = JOB == kKeySimilarity ? a.mean_rows * p.kv_heads : int64_t{a.row_room} * p.q_heads;
  if (runs == 0) return cudaSuccess;
  if (runs > std::numeric_limits<int32_t>::max() - kWarps) return cudaErrorInvalidConfiguration;
  const bool vector = p.head_dim % kColumns == 0 && ReadsBy16Bytes(JOB == kKeySimilarity ? p.k : p.q);
  const auto kernel = p.q.dtype == FP_BF16
                          ? vector ? RunKernel<__nv_bfloat16, true, JOB> : RunKernel<__nv_bfloat16, false, JOB>
                      : vector ? RunKernel<__half, true, JOB>
                               : RunKernel<__half, false, JOB>;
  kernel<<<static_cast<unsigned>(DivUp<int64_t>(runs, kWarps)), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

} // namespace

cudaError_t LaunchPooledRows(const PooledShape& shape, cudaStream_t stream) {
  return LaunchRuns<kQueryRows>({shape, 0, nullptr, nullptr, nullptr, nullptr}, stream);
}

cudaError_t LaunchSimilarity(const SimilarityArgs& args, cudaStream_t stream) {
  const Problem& p = args.shape.d.p;
  CenterKernel<<<dim3(static_cast<unsigned>(p.kv_heads), static_cast<unsigned>(p.batch)), kCenterThreads, 0, stream>>>(
      args);
  if (cudaError_t e = cudaGetLastError()) return e;
  if (cudaError_t e = LaunchRuns<kKeySimilarity>(args, stream)) return e;
  return LaunchRuns<kQuerySimilarity>(args, stream);
}

} // namespace flashprefill::cuda
