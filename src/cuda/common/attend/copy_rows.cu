// The copy of K and V out of small pages (copy_rows.h). Bound by memory: 16 bytes per thread, eight loads in flight,
// neighbouring threads on neighbouring bytes of a token, all its heads together, so that a page of one token is read in
// whole sectors.
#include <limits>

#include "cuda/common/attend/copy_rows.h"
#include "cuda/common/attend/tiles.cuh"
#include "cuda/common/grid_control.cuh"
#include "cuda/common/launch.h"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 8;
constexpr int kTokens = 16; // of a sequence per CTA

struct CopyJobs {
  AttendArgs a;
  KeyCopy copy;
  int parts;          // CTAs per sequence
  int pieces;         // 16 bytes each, of a token's K
  int pieces_of_head; // and of one head's
  Divider by_parts, by_pieces, by_head;
};

__global__ void __launch_bounds__(kThreads) CopyKernel(const __grid_constant__ CopyJobs jobs) {
  GridRelease();
  const AttendArgs& p = jobs.a;
  const int part = static_cast<int>(blockIdx.x);
  const int b = jobs.by_parts(part), first = (part - b * jobs.parts) * kTokens;
  const int k_len = KeyLength(p, b, 0);
  if (first == 0 && threadIdx.x == 0) jobs.copy.lengths[b] = k_len;
  const int tokens = min(kTokens, k_len - first);
  if (tokens <= 0) return;
  __shared__ int place[kTokens][2]; // page, and slot in it
  if (threadIdx.x < tokens) {
    const int position = first + static_cast<int>(threadIdx.x), column = p.by_page(position);
    const int page = __ldg(p.block_table + b * p.block_table_stride + min(column, p.pages_per_seq - 1));
    place[threadIdx.x][0] = ClampTo(page, p.page_count - 1);
    place[threadIdx.x][1] = position - column * p.page_size;
  }
  __syncthreads();
  const auto copy = [&](const void* data, const int64_t(&stride)[3], uint16_t* to) {
    const int count = tokens * jobs.pieces;
    uint4* const out = reinterpret_cast<uint4*>(to) + (int64_t{b} * p.max_k + first) * jobs.pieces;
#pragma unroll 1
    for (int begin = static_cast<int>(threadIdx.x); begin < count; begin += kInFlight * kThreads) {
      uint4 held[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int at = begin + i * kThreads;
        if (at >= count) continue;
        const int token = jobs.by_pieces(at), piece = at - token * jobs.pieces;
        const int head = jobs.by_head(piece), of_head = piece - head * jobs.pieces_of_head;
        const int64_t offset = place[token][0] * stride[0] + place[token][1] * stride[1] + head * stride[2];
        held[i] = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + offset) + of_head);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int at = begin + i * kThreads;
        if (at < count) out[at] = held[i];
      }
    }
  };
  copy(p.k_data, p.k_stride, jobs.copy.k);
  copy(p.v_data, p.v_stride, jobs.copy.v);
}

} // namespace

cudaError_t LaunchCopyRows(const AttendArgs& args, const KeyCopy& copy, cudaStream_t stream) {
  CopyJobs jobs{};
  jobs.a = args;
  jobs.copy = copy;
  jobs.parts = static_cast<int>(DivUp<int64_t>(args.max_k, kTokens));
  if (int64_t{jobs.parts} * args.batch > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  if (jobs.parts == 0) return cudaSuccess;
  jobs.pieces_of_head = args.head_dim / 8;
  jobs.pieces = args.kv_heads * jobs.pieces_of_head;
  jobs.by_parts = Divider::Of(jobs.parts);
  jobs.by_pieces = Divider::Of(jobs.pieces);
  jobs.by_head = Divider::Of(jobs.pieces_of_head);
  CopyKernel<<<jobs.parts * args.batch, kThreads, 0, stream>>>(jobs);
  return cudaGetLastError();
}

} // namespace flashprefill::cuda
