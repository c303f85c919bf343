// Sketch's query metric: the weight of a dimension in the distances of keys, the sum of squares that the last row of
// each tile has there, over the query heads of a KV head. Its own launch before the pooling pass, for a hundredth of
// Q's bytes. A head's rows are dealt out to kMetricParts CTAs, whose sums the pooling pass adds up, always in one
// order.
#include "cuda/common/energies/pool.h"
#include "cuda/common/energies/pool_rows.cuh"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(kThreads) MetricKernel(const __grid_constant__ PoolArgs a, int chunks) {
  __shared__ float partial[kThreads][kColumns];
  const Problem& p = a.d.p;
  const TileRules& r = a.rules;
  const int part = blockIdx.x, kv = blockIdx.y, b = blockIdx.z;
  const DeviceSequence s = SequenceAt(a.d, b);
  const int group = r.heads_per_tile * r.units_per_kv, rows = s.q_len > 0 ? s.Tiles(r) * group : 0;
  const int lanes = kThreads / chunks; // rows at a time
  const int mine = threadIdx.x / chunks, column = threadIdx.x % chunks * kColumns;

  float sum[kColumns] = {};
  if (mine < lanes) {
    for (int row = part * lanes + mine; row < rows; row += kMetricParts * lanes) {
      const int m = row / group, head = kv * group + row - m * group;
      const int last = min((m + 1) * r.tile_tokens, s.q_len) - 1;
      const T* const from = static_cast<const T*>(p.q.data) + RowOffsetAt(p, p.q.stride, s, last, head);
      const Chunk<T> chunk = LoadChunk<T, VECTOR>(from, column, p.head_dim, p.q.stride[3]);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const float square = ToFloat(chunk.value[i]) * ToFloat(chunk.value[i]);
        sum[i] += square < INFINITY ? square : 0.f; // non-finite values are left out
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) partial[threadIdx.x][i] = sum[i];
  __syncthreads();
  for (int d = threadIdx.x; d < a.pitch; d += kThreads) {
    float total = 0;
    for (int lane = 0; lane < lanes; ++lane) total += partial[lane * chunks + d / kColumns][d % kColumns];
    a.metric[((int64_t{b} * p.kv_heads + kv) * kMetricParts + part) * a.pitch + d] = total;
  }
}

} // namespace

cudaError_t LaunchMetric(const PoolArgs& args, bool aligned, cudaStream_t stream) {
  const Problem& p = args.d.p;
  const int chunks = DivUp(p.head_dim, kColumns);
  const dim3 grid(kMetricParts, static_cast<unsigned>(p.kv_heads), static_cast<unsigned>(p.batch));
  const bool bf16 = p.q.dtype == FP_BF16;
  const auto kernel = bf16 ? (aligned ? MetricKernel<__nv_bfloat16, true> : MetricKernel<__nv_bfloat16, false>)
                           : (aligned ? MetricKernel<__half, true> : MetricKernel<__half, false>);
  kernel<<<grid, kThreads, 0, stream>>>(args, chunks);
  return cudaGetLastError();
}

} // namespace flashprefill::cuda
