// The host side of attend: what it can't do, tensor maps, and the launch. The kernel itself is sm90/attend.cuh.
#include "cuda/attend.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <tuple>
#include <utility>

#include "cuda/common/tensor_map.h"
#include "cuda/sm90/attend_params.h"

namespace flashprefill::cuda {
namespace {

// Smallest padded head dimension, of those that there is a kernel for.
int PaddedHeadDim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

int KeysPerStep(int head_dim) {
  return PaddedHeadDim(head_dim) == 256 ? AttendShape<256>::kKeys : AttendShape<128>::kKeys;
}

// Keys that one bulk copy brings: whole power-of-2 parts of a block and of a page, and no more than a step takes.
int ChunkKeys(const Problem& p, int block_size) {
  const int common = p.block_table ? block_size | p.page_size : block_size;
  return std::min(common & -common, KeysPerStep(p.head_dim));
}

// Pages of which a bulk copy would bring less than 16 rows are read row by row.
bool Gathers(const Problem& p, int block_size) { return p.block_table && ChunkKeys(p, block_size) < 16; }

bool Aligned(const fp_tensor& t) {
  if (reinterpret_cast<uintptr_t>(t.data) % 16 != 0 || t.stride[3] != 1) return false;
  for (int i = 0; i < 3; ++i) {
    if (t.stride[i] < 0 || t.stride[i] % 8 != 0) return false;
  }
  return true;
}

// KV heads that are worked on together: as many as leave their K and V in L2 (60 MB on an H200, of which each half of
// the chip may hold its own copy). Together, the end of the work is evened out better; at 64K and one head it was
// measured to be 16 % faster than all 8 together.
int SectionHeads(const Problem& p) {
  constexpr int64_t kBytes = 20 << 20;
  const int64_t head_bytes = std::max<int64_t>(1, p.max_seqlen_k) * p.head_dim * 4;
  int heads = p.kv_heads;
  while (heads > 1 && (p.kv_heads % heads != 0 || heads * head_bytes > kBytes)) --heads;
  return heads;
}

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

} // namespace

const char* AttendUnsupported(const Problem& p, const BlockMask& mask, const Output* output) {
  if (p.q.dtype != FP_BF16 && p.q.dtype != FP_F16) return "q must be bf16 or fp16 on CUDA";
  if (p.k.dtype != p.q.dtype || p.v.dtype != p.q.dtype) return "q, k and v must have one dtype on CUDA";
  if (p.head_dim % 8 != 0 || p.head_dim > 256) return "head_dim must be a multiple of 8 up to 256 on CUDA";
  if (mask.max_verticals > 0 || mask.max_slashes > 0) return "masks with verticals or slashes are for the CPU";
  if (mask.tile_tokens < 1) return "a shared mask takes groups of at most 128 query heads";
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;
  if (p.total_q > kMost || p.total_k > kMost || p.max_seqlen_k > kMost) return "fewer than 2^30 tokens on CUDA";
  if (p.block_table && p.page_count > 0 && std::max(p.k.stride[0], p.v.stride[0]) > (int64_t{1} << 35) / p.page_count) {
    return "a paged cache of at most 2^35 elements on CUDA";
  }
#define FLASHPREFILL_ALIGNMENT \
  " must be 16-byte aligned on CUDA, with head_dim stride 1 and the other strides multiples of 8 and not negative"
  if (!Aligned(p.q)) return "q" FLASHPREFILL_ALIGNMENT;
  if (!Aligned(p.k)) return "k" FLASHPREFILL_ALIGNMENT;
  if (!Aligned(p.v)) return "v" FLASHPREFILL_ALIGNMENT;
  if (output && !Aligned(output->out)) return "out" FLASHPREFILL_ALIGNMENT;
#undef FLASHPREFILL_ALIGNMENT
  return nullptr;
}

size_t AttendScratchBytes() { return kWorkspaceAlign; } // the tile counter

cudaError_t LaunchAttend(const AttendArgs& args, cudaStream_t stream) {
  const Problem& p = *args.problem;
  const BlockMask& mask = *args.mask;
  const Output& output = *args.output;
  if (p.batch == 0 || p.total_q == 0) return cudaSuccess;
  const bool gathers = Gathers(p, mask.block_size);
  const int chunk =
      gathers ? std::min(mask.block_size & -mask.block_size, KeysPerStep(p.head_dim)) : ChunkKeys(p, mask.block_size);

  AttendParams a{};
  a.group = p.q_heads / p.kv_heads;
  a.heads_per_tile = mask.share_heads ? a.group : 1;
  a.token_of_row = (65536 + a.heads_per_tile - 1) / a.heads_per_tile;
  a.tile_tokens = mask.tile_tokens;
  {
    const bool packed = p.cu_seqlens_q != nullptr;
    TensorMapShape shape{{p.head_dim, p.q_heads, packed ? p.total_q : p.max_seqlen_q, packed ? 1 : p.batch},
                         {p.q.stride[2], p.q.stride[1], p.q.stride[0]},
                         a.heads_per_tile,
                         a.tile_tokens};
    if (const cudaError_t e = MakeTensorMap(&a.q, p.q.data, p.q.dtype, shape); e != cudaSuccess) return e;
    const fp_tensor& out = output.out;
    a.bulk_out = 16 % a.heads_per_tile == 0;
    for (int i = 0; i < 3; ++i) {
      shape.stride[i] = out.stride[2 - i];
      a.bulk_out &= shape.size[i + 1] <= 1 || out.stride[2 - i] > 0;
    }
    shape.box_tokens = 16 / a.heads_per_tile;
    if (a.bulk_out) {
      if (const cudaError_t e = MakeTensorMap(&a.out_map, out.data, out.dtype, shape); e != cudaSuccess) return e;
    }
  }
  if (!gathers) {
    for (const auto& [map, tensor] : {std::pair{&a.k, &p.k}, std::pair{&a.v, &p.v}}) {
      const cudaError_t e = MakeTensorMap(map, tensor->data, tensor->dtype, KeyShape(p, *tensor, chunk));
      if (e != cudaSuccess) return e;
    }
  }
  if (mask.mean_correction) {
    a.mean_rows = MeanRows(p, mask.block_size);
    a.mean_rows_each = static_cast<int>(DivUp<int64_t>(p.max_seqlen_k, mask.block_size));
    a.mean_stride[1] = p.head_dim;
    a.mean_stride[2] = a.mean_rows * p.head_dim;
    const TensorMapShape shape{
        {p.head_dim, p.kv_heads, a.mean_rows, 1}, {a.mean_stride[2], a.mean_stride[1], 0}, 1, KeysPerStep(p.head_dim)};
    TensorMapShape part = shape;
    part.box_tokens = kMeanPartRows;
    for (const auto& [map, data, s] : {std::tuple{&a.k_mean, args.k_means, &shape},
                                       {&a.v_mean, args.v_means, &shape},
                                       {&a.v_mean_part, args.v_means, &part}}) {
      if (const cudaError_t e = MakeTensorMap(map, data, p.k.dtype, *s); e != cudaSuccess) return e;
    }
  }
  a.k_data = p.k.data;
  a.v_data = p.v.data;
  a.v_mean_data = args.v_means;
  for (int i = 0; i < 3; ++i) {
    const bool unused_batch = i == 0 && p.cu_seqlens_k && !p.block_table;
    a.k_stride[i] = unused_batch ? 0 : p.k.stride[i];
    a.v_stride[i] = unused_batch ? 0 : p.v.stride[i];
    if (i < 2) a.k_units[i] = static_cast<uint32_t>(a.k_stride[i] / 8);
    if (i < 2) a.v_units[i] = static_cast<uint32_t>(a.v_stride[i] / 8);
    a.out_stride[i] = i == 0 && p.cu_seqlens_q ? 0 : output.out.stride[i];
    a.lse_stride[i] = i == 0 && p.cu_seqlens_q ? 0 : output.lse_stride[i];
  }
  a.out = output.out.data;
  a.lse = output.lse;
  a.cu_seqlens_q = p.cu_seqlens_q;
  a.cu_seqlens_k = p.cu_seqlens_k;
  a.seqused_k = p.seqused_k;
  a.block_table = p.block_table;
  a.block_table_stride = p.block_table_stride;
  a.bits = mask.bits;
  a.tile_rows = mask.tile_rows;
  a.words = static_cast<int>(DivUp<int64_t>(DivUp<int64_t>(p.max_seqlen_k, mask.block_size), 64));
  if (mask.bits) a.words = static_cast<int>(mask.words);
  a.counter = static_cast<int*>(args.scratch);
  a.batch = p.batch;
  a.kv_heads = p.kv_heads;
  a.section_heads = SectionHeads(p);
  a.head_dim = p.head_dim;
  a.block_size = mask.block_size;
  while (1 << a.chunk_shift < chunk) ++a.chunk_shift;
  a.page_size = p.block_table ? p.page_size : 0;
  a.page_count = static_cast<int>(std::min<int64_t>(p.page_count, std::numeric_limits<int32_t>::max()));
  a.pages_per_seq = p.pages_per_seq;
  a.absent_token = static_cast<int>(p.block_table ? p.page_size : p.cu_seqlens_k ? p.total_k : p.max_seqlen_k);
  a.mask_heads = a.group / a.heads_per_tile;
  a.by_tile = Divider::Of(a.tile_tokens);
  a.by_tiles = Divider::Of(std::max<int64_t>(1, DivUp<int64_t>(p.max_seqlen_q, a.tile_tokens)));
  a.by_block = Divider::Of(a.block_size);
  a.by_in_tile = Divider::Of(a.mask_heads * a.section_heads);
  a.by_mask_heads = Divider::Of(a.mask_heads);
  a.by_page = Divider::Of(std::max(1, a.page_size));
  a.causal = p.causal;
  a.mean_correction = mask.mean_correction;
  a.total_q = static_cast<int>(p.total_q);
  a.total_k = static_cast<int>(p.total_k);
  a.max_q = static_cast<int>(p.max_seqlen_q);
  a.max_k = static_cast<int>(p.max_seqlen_k);
  a.scale_log2 = p.softmax_scale * std::numbers::log2e_v<float>;
  a.mean_bias_log2 = std::log2(static_cast<float>(mask.block_size));
  a.mean_bias = a.mean_bias_log2 / a.scale_log2;
  a.minus_one = -1;

  const AttendKernelSet kernels =
      p.q.dtype == FP_BF16 ? PickKernels<__nv_bfloat16>(p.head_dim) : PickKernels<__half>(p.head_dim);
  // One warp needs some 100 ns a bulk copy, and a tile has two a chunk (at d128) of K and of V.
  const bool four_warps = KeysPerStep(p.head_dim) / chunk >= 4;
  const void* kernel = gathers ? kernels.rows : four_warps ? kernels.chunks : kernels.tiles;
  int device, processors;
  if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaError_t e =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kernels.shared_bytes));
  if (e == cudaSuccess && !args.follows_select) e = LaunchAttendStart(a.counter, stream);
  if (e != cudaSuccess) return e;
  const int64_t items = (p.total_q / a.tile_tokens + p.batch) * p.kv_heads * a.mask_heads;
  void* parameters[] = {&a};
  cudaLaunchAttribute overlap{}; // this kernel may start while the one before it ends; it waits for it itself
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(items, processors)));
  config.blockDim = dim3(kAttendThreads);
  config.dynamicSmemBytes = kernels.shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelExC(&config, kernel, parameters);
}

} // namespace flashprefill::cuda
