// How much of the mean keys' squares lies in each band of dimensions, added up from a sequence's first block on: a CTA
// for each sequence and KV head, which reads its means once, a warp for each, and then runs along the blocks.
#include "cuda/common/numbers.cuh"
#include "cuda/common/pooled/args.h"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

template <typename T>
__device__ BandSquares SquaresOf(const PooledShape& a, const T* mean) {
  float sum[1 + kMostBands] = {};
  for (int d = threadIdx.x % 32; d < a.d.p.head_dim; d += 32) {
    const float x = ToFloat(mean[d]), square = x * x;
    sum[0] += square;
#pragma unroll
    for (int band = 0; band < kMostBands; ++band) {
      if (a.bands.dims[band][d / 32] >> (d % 32) & 1) sum[1 + band] += square;
    }
  }
#pragma unroll
  for (float& x : sum) x = WarpSum(x);
  if (!IsFinite(sum[0])) return {};
  return {sum[0], {sum[1], sum[2]}};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    BandSquaresKernel(const __grid_constant__ PooledShape a, BandSquares* const all) {
  const Problem& p = a.d.p;
  const DeviceSequence s = SequenceAt(a.d, blockIdx.y);
  if (s.q_len == 0 || KeepsEverything(p, a.rules, s)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = s.Blocks(a.rules);
  const int64_t first = int64_t{blockIdx.x} * a.mean_rows + MeanBase(p, s, a.rules.block_size);
  BandSquares* const squares = all + first;
  const T* const means = static_cast<const T*>(a.k_means) + first * a.pitch;
  for (int b = warp; b < blocks; b += kWarps) {
    const BandSquares its = SquaresOf(a, means + int64_t{b} * a.pitch);
    if (lane == 0) squares[b] = its;
  }
  __syncthreads();
  if (warp > kMostBands) return;
  // One warp for each sum.
  double before = 0;
  for (int begin = 0; begin < blocks; begin += 32) {
    const int b = begin + lane;
    double* const at = b >= blocks ? nullptr : warp == 0 ? &squares[b].all : &squares[b].band[warp - 1];
    double sum = at ? *at : 0;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const double other = __shfl_up_sync(~0u, sum, offset);
      if (lane >= offset) sum += other;
    }
    sum += before;
    if (at) *at = sum;
    before = __shfl_sync(~0u, sum, 31);
  }
}

} // namespace

cudaError_t LaunchBandSquares(const PooledShape& shape, BandSquares* squares, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(shape.d.p.kv_heads), static_cast<unsigned>(shape.d.p.batch));
  if (shape.d.p.q.dtype == FP_BF16) {
    BandSquaresKernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(shape, squares);
  } else {
    BandSquaresKernel<__half><<<grid, kThreads, 0, stream>>>(shape, squares);
  }
  return cudaGetLastError();
}

} // namespace flashprefill::cuda
