// The copy of K and V out of small pages and FP8 caches (key_copy.h). Bound by memory: eight values per thread and
// load, eight loads in flight, neighbouring threads on neighbouring bytes of a token, all its heads together, so that a
// page of one token is read in whole sectors.
#include <cuda_fp8.h>

#include <limits>
#include <type_traits>

#include "cuda/common/grid_control.cuh"
#include "cuda/common/keys/key_copy.h"
#include "cuda/common/launch.h"
#include "cuda/common/numbers.cuh"
#include "cuda/common/sequence.cuh"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 8;
constexpr int kTokens = 16; // of a sequence per CTA
constexpr int kPiece = 8;   // values per load

struct CopyJobs {
  DeviceProblem d;
  KeyCopy copy;
  int parts;          // CTAs per sequence
  int pieces;         // of a token's K
  int pieces_of_head; // and of one head's
  Divider by_parts, by_pieces, by_head, by_page;
};

// Where the tokens of a CTA lie: page and slot; or sequence and token; or 0 and the token of all.
struct Places {
  int64_t at[kTokens][2];
};

// A piece, as it comes and as it goes.
template <typename T, bool FP8>
using Piece = std::conditional_t<FP8, uint2, uint4>;

template <typename T>
__device__ __forceinline__ uint4 Widened(const uint4& piece, float) {
  return piece;
}
template <typename T>
__device__ __forceinline__ uint4 Widened(const uint2& piece, float scale) {
  uint32_t to[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = (i < 2 ? piece.x : piece.y) >> (i % 2 * 16);
    const __half2 exact(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3));
    const float2 x = __half22float2(exact);
    const T low = FromFloat<T>(x.x * scale), high = FromFloat<T>(x.y * scale);
    to[i] = static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&low)) |
            static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&high)) << 16;
  }
  return uint4{to[0], to[1], to[2], to[3]};
}

// K or V of a CTA's tokens. scale: of the sequence, by KV head; may be null.
template <typename T, bool FP8>
__device__ void CopyTensor(const CopyJobs& jobs, const Tensor& from, const float* scale, int64_t scale_stride,
                           const Places& places, int tokens, uint4* to) {
  using Raw = std::conditional_t<FP8, uint8_t, uint16_t>;
  const int count = tokens * jobs.pieces;
#pragma unroll 1
  for (int begin = static_cast<int>(threadIdx.x); begin < count; begin += kInFlight * kThreads) {
    Piece<T, FP8> held[kInFlight];
    float worth[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int at = begin + i * kThreads;
      if (at >= count) continue;
      const int token = jobs.by_pieces(at), piece = at - token * jobs.pieces;
      const int head = jobs.by_head(piece), of_head = piece - head * jobs.pieces_of_head;
      const int64_t offset = places.at[token][0] * from.stride[0] + places.at[token][1] * from.stride[1] +
                             head * from.stride[2] + of_head * kPiece;
      held[i] = __ldg(reinterpret_cast<const Piece<T, FP8>*>(static_cast<const Raw*>(from.data) + offset));
      worth[i] = FP8 && scale ? __ldg(scale + head * scale_stride) : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int at = begin + i * kThreads;
      if (at < count) to[at] = Widened<T>(held[i], worth[i]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) CopyKernel(const __grid_constant__ CopyJobs jobs) {
  GridRelease();
  const Problem& p = jobs.d.p;
  const int part = static_cast<int>(blockIdx.x);
  const int b = jobs.by_parts(part), first = (part - b * jobs.parts) * kTokens;
  const DeviceSequence s = SequenceAt(jobs.d, b);
  if (first == 0 && threadIdx.x == 0) {
    if (jobs.copy.lengths) {
      const int64_t said = p.seqused_k      ? int64_t{p.seqused_k[b]}
                           : p.cu_seqlens_k ? int64_t{p.cu_seqlens_k[b + 1]} - p.cu_seqlens_k[b]
                                            : p.max_seqlen_k;
      jobs.copy.lengths[b] = said == s.k_len ? s.k_len : -1;
    }
    if (jobs.copy.one && b == 0) *jobs.copy.one = 1;
  }
  const int tokens = min(kTokens, s.k_len - first);
  if (tokens <= 0) return;
  __shared__ Places places;
  if (threadIdx.x < tokens) {
    const int t = first + static_cast<int>(threadIdx.x);
    const int column = p.block_table ? jobs.by_page(t) : 0;
    places.at[threadIdx.x][0] = p.block_table ? PageAt(p, b, column) : PackedKeys(p) ? 0 : b;
    places.at[threadIdx.x][1] = p.block_table ? t - column * p.page_size : s.k_begin + t;
  }
  __syncthreads();
  const int64_t row = (PackedKeys(p) ? int64_t{s.k_begin} : b * p.max_seqlen_k) + first;
  const auto copy = [&](const Tensor& from, const float* scale, const int64_t(&stride)[2], uint16_t* to) {
    uint4* const rows = reinterpret_cast<uint4*>(to) + row * jobs.pieces;
    if (from.dtype == FP_E4M3) {
      CopyTensor<T, true>(jobs, from, scale ? scale + b * stride[0] : nullptr, stride[1], places, tokens, rows);
    } else {
      CopyTensor<T, false>(jobs, from, nullptr, 0, places, tokens, rows);
    }
  };
  copy(p.k, p.k_scale, p.k_scale_stride, jobs.copy.k);
  if (jobs.copy.v) copy(p.v, p.v_scale, p.v_scale_stride, jobs.copy.v);
}

} // namespace

cudaError_t LaunchKeyCopy(const Problem& p, const KeyCopy& copy, cudaStream_t stream) {
  CopyJobs jobs{};
  jobs.d = DeviceProblem::Of(p);
  jobs.copy = copy;
  jobs.parts = static_cast<int>(DivUp<int64_t>(p.max_seqlen_k, kTokens));
  if (int64_t{jobs.parts} * p.batch > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  if (jobs.parts == 0 || p.batch == 0) return cudaSuccess;
  jobs.pieces_of_head = p.head_dim / kPiece;
  jobs.pieces = p.kv_heads * jobs.pieces_of_head;
  jobs.by_parts = Divider::Of(jobs.parts);
  jobs.by_pieces = Divider::Of(jobs.pieces);
  jobs.by_head = Divider::Of(jobs.pieces_of_head);
  jobs.by_page = Divider::Of(p.block_table ? p.page_size : 1);
  const auto kernel = p.q.dtype == FP_BF16 ? CopyKernel<__nv_bfloat16> : CopyKernel<__half>;
  kernel<<<jobs.parts * p.batch, kThreads, 0, stream>>>(jobs);
  return cudaGetLastError();
}

} // namespace flashprefill::cuda
