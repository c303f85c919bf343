// The Hopper attend from the host's side: how keys are loaded, tensor maps, launch.
#include "cuda/common/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>

#include "core/key_list.h"
#include "cuda/common/attend/plan.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sm90/attend/params.h"

namespace flashprefill::cuda {
namespace {

int KeysPerStep(int head_dim) {
  return PaddedHeadDim(head_dim) == 256 ? AttendShape<256>::kKeys : AttendShape<128>::kKeys;
}

// How keys come. A bulk copy brings whole power-of-2 parts of a block and of a page. Pages of which it would bring less
// than 16 rows are read row by row.
struct Loads {
  bool by_rows;
  int chunk; // keys that lie together

  static Loads Of(const Problem& p, const BlockMask& mask) {
    const int keys = KeysPerStep(p.head_dim), block_size = mask.block_size;
    if (HasKeyLists(mask)) return {true, ChunkKeys(block_size, keys)};
    const int chunk = ChunkKeys(p.block_table ? block_size | p.page_size : block_size, keys);
    if (p.block_table && chunk < kBulkPageKeys) return {true, ChunkKeys(block_size, keys)};
    return {false, chunk};
  }
};

template <class T>
AttendKernelSet PickKernels(int head_dim) {
  switch (PaddedHeadDim(head_dim)) {
    case 64:
      return AttendKernels<T, 64>();
    case 128:
      return AttendKernels<T, 128>();
    default:
      return AttendKernels<T, 256>();
  }
}

template <class T>
OneAttendKernel PickSkipKernel(int head_dim) {
  return PaddedHeadDim(head_dim) == 64 ? AttendSkipKernel<T, 64>() : AttendSkipKernel<T, 128>();
}

template <class T>
OneAttendKernel PickGatherKernel(int head_dim) {
  switch (PaddedHeadDim(head_dim)) {
    case 64:
      return AttendGatherKernel<T, 64>();
    case 128:
      return AttendGatherKernel<T, 128>();
    default:
      return AttendGatherKernel<T, 256>();
  }
}

TensorMapShape KeyShape(const Problem& p, const fp_tensor& t, int chunk) {
  TensorMapShape shape{{p.head_dim, p.kv_heads, 0, 0}, {t.stride[2], t.stride[1], t.stride[0]}, 1, chunk};
  if (p.block_table) {
    shape.size[2] = p.page_size;
    shape.size[3] = p.page_count;
  } else if (p.cu_seqlens_k) {
    shape.size[2] = p.total_k;
    shape.size[3] = 1;
  } else {
    shape.size[2] = p.max_seqlen_k;
    shape.size[3] = p.batch;
  }
  return shape;
}

cudaError_t MakeKeyMaps(const AttendCall& call, const Loads& loads, AttendParams& a) {
  const Problem& p = call.p;
  if (!loads.by_rows) {
    if (cudaError_t e = MakeTensorMap(&a.k, p.k.data, p.k.dtype, KeyShape(p, p.k, loads.chunk))) return e;
    if (cudaError_t e = MakeTensorMap(&a.v, p.v.data, p.v.dtype, KeyShape(p, p.v, loads.chunk))) return e;
  }
  if (!call.mask.mean_correction) return cudaSuccess;
  TensorMapShape blocks{
      {p.head_dim, p.kv_heads, a.mean_rows, 1}, {a.mean_stride[2], a.mean_stride[1], 0}, 1, KeysPerStep(p.head_dim)};
  if (cudaError_t e = MakeTensorMap(&a.k_mean, call.means.k, p.k.dtype, blocks)) return e;
  if (cudaError_t e = MakeTensorMap(&a.v_mean, call.means.v, p.k.dtype, blocks)) return e;
  blocks.box_tokens = kMeanPartRows;
  return MakeTensorMap(&a.v_mean_part, call.means.v, p.k.dtype, blocks);
}

} // namespace

cudaError_t SetRowParams(const AttendCall& call, AttendParams& a) {
  const Problem& p = call.p;
  a.bulk_out = 16 % a.heads_per_tile == 0;
  a.minus_one = -1;
  const bool packed = p.cu_seqlens_q != nullptr;
  TensorMapShape rows{{p.head_dim, p.q_heads, packed ? p.total_q : p.max_seqlen_q, packed ? 1 : p.batch},
                      {p.q.stride[2], p.q.stride[1], p.q.stride[0]},
                      a.heads_per_tile,
                      a.tile_tokens};
  if (cudaError_t e = MakeTensorMap(&a.q, p.q.data, p.q.dtype, rows)) return e;

  // Whole tokens of 16 rows of the output, if its strides can be a tensor map's.
  const Tensor& out = call.output.out;
  for (int i = 0; i < 3; ++i) {
    rows.stride[i] = out.stride[2 - i];
    a.bulk_out &= rows.size[i + 1] <= 1 || out.stride[2 - i] > 0;
  }
  rows.box_tokens = 16 / a.heads_per_tile;
  return a.bulk_out ? MakeTensorMap(&a.out_map, out.data, out.dtype, rows) : cudaSuccess;
}

cudaError_t LaunchAttendSm90(const AttendArgs& args, const AttendCall& call, cudaStream_t stream) {
  const Problem& p = call.p;
  AttendParams a{};
  static_cast<AttendArgs&>(a) = args;
  const Loads loads = Loads::Of(p, call.mask);
  while (1 << a.chunk_shift < loads.chunk) ++a.chunk_shift;
  a.absent_token = static_cast<int>(p.block_table ? p.page_size : p.cu_seqlens_k ? p.total_k : p.max_seqlen_k);
  a.beside = call.beside;
  if (cudaError_t e = SetRowParams(call, a)) return e;
  if (cudaError_t e = MakeKeyMaps(call, loads, a)) return e;

  int processors = 0;
  if (cudaError_t e = CountProcessors(&processors)) return e;
  const auto launch = [&](AttendKernel kernel, int shared_bytes) {
    if (cudaError_t e = AllowShared(kernel, shared_bytes)) return e;
    return LaunchOverlapped(kernel, true, std::min<int64_t>(call.items, processors), kAttendThreads, shared_bytes,
                            stream, a);
  };
  if (HasKeyLists(call.mask)) {
    a.listed = ListArgs::Of(call.mask);
    const OneAttendKernel gather =
        p.q.dtype == FP_BF16 ? PickGatherKernel<__nv_bfloat16>(p.head_dim) : PickGatherKernel<__half>(p.head_dim);
    return launch(gather.kernel, gather.shared_bytes);
  }
  if (call.mask.skip > 0) {
    a.skip = {std::log2(call.mask.skip) / a.exponent_scale, call.mask.skipped};
    const OneAttendKernel skips =
        p.q.dtype == FP_BF16 ? PickSkipKernel<__nv_bfloat16>(p.head_dim) : PickSkipKernel<__half>(p.head_dim);
    return launch(skips.kernel, skips.shared_bytes);
  }
  const AttendKernelSet kernels =
      p.q.dtype == FP_BF16 ? PickKernels<__nv_bfloat16>(p.head_dim) : PickKernels<__half>(p.head_dim);
  // One warp needs some 100 ns per bulk copy, and a tile has two per chunk (at d128) of K and of V.
  const bool four_warps = KeysPerStep(p.head_dim) / loads.chunk >= 4;
  return launch(loads.by_rows ? kernels.rows : four_warps ? kernels.chunks : kernels.tiles, kernels.shared_bytes);
}

} // namespace flashprefill::cuda
