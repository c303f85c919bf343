// Host side of attend: limits, kernel arguments, tensor maps, launch. See plan.h.
#include "cuda/sm90/attend/plan.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

#include "cuda/common/launch.h"
#include "cuda/common/tensor_access.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sm90/attend/order.h"
#include "cuda/sm90/attend/params.h"

namespace flashprefill::cuda {
namespace {

// Smallest padded head dimension, of those that there is a kernel for.
int PaddedHeadDim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

int KeysPerStep(int head_dim) {
  return PaddedHeadDim(head_dim) == 256 ? AttendShape<256>::kKeys : AttendShape<128>::kKeys;
}

// The largest power of 2 in all of these bits' numbers, and no more keys than a step takes.
int ChunkKeys(const Problem& p, int sizes) { return std::min(sizes & -sizes, KeysPerStep(p.head_dim)); }

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

AttendPlan AttendPlan::Of(const Problem& p, const BlockMask& mask) {
  AttendPlan plan;
  plan.p_ = &p;
  plan.mask_ = &mask;
  // A bulk copy brings whole power-of-2 parts of a block and of a page. Pages of which it would bring less than 16 rows
  // are read row by row.
  plan.chunk_ = ChunkKeys(p, p.block_table ? mask.block_size | p.page_size : mask.block_size);
  plan.gathers_ = p.block_table && plan.chunk_ < 16;
  if (plan.gathers_) plan.chunk_ = ChunkKeys(p, mask.block_size);
  const int64_t items = plan.MaxItems();
  if (items <= kMaxOrderedItems && items * p.max_seqlen_k >= kMinOrderedWork) plan.ordered_items_ = items;
  return plan;
}

int64_t AttendPlan::MaxItems() const {
  return mask_->tile_tokens < 1 ? 0 : (p_->total_q / mask_->tile_tokens + p_->batch) * mask_->heads;
}

const char* AttendPlan::Unsupported(const Output* output) const {
  const Problem& p = *p_;
  if (p.q.dtype != FP_BF16 && p.q.dtype != FP_F16) return "q must be bf16 or fp16 on CUDA";
  if (p.k.dtype != p.q.dtype || p.v.dtype != p.q.dtype) return "q, k and v must have one dtype on CUDA";
  if (p.head_dim % 8 != 0 || p.head_dim > 256) return "head_dim must be a multiple of 8 up to 256 on CUDA";
  if (mask_->max_verticals > 0 || mask_->max_slashes > 0) return "masks with verticals or slashes are for the CPU";
  if (mask_->tile_tokens < 1) return "a shared mask takes groups of at most 128 query heads";
  if (!FewTokens(p)) return "fewer than 2^30 tokens on CUDA";
  if (p.block_table && p.page_count > 0 && std::max(p.k.stride[0], p.v.stride[0]) > (int64_t{1} << 35) / p.page_count) {
    return "a paged cache of at most 2^35 elements on CUDA";
  }
  if (!IsAligned(p.q)) return kUnalignedQ;
  if (!IsAligned(p.k)) return kUnalignedK;
  if (!IsAligned(p.v)) return kUnalignedV;
  if (output && !IsAligned(output->out)) return kUnalignedOut;
  return nullptr;
}

// Everything but the tensor maps.
void AttendPlan::FillParams(const Output& output, const Means& means, AttendParams& a) const {
  const Problem& p = *p_;
  const BlockMask& mask = *mask_;
  a.group = p.q_heads / p.kv_heads;
  a.heads_per_tile = mask.share_heads ? a.group : 1;
  a.token_of_row = (65536 + a.heads_per_tile - 1) / a.heads_per_tile;
  a.tile_tokens = mask.tile_tokens;
  a.bulk_out = 16 % a.heads_per_tile == 0;
  if (mask.mean_correction) {
    a.mean_rows = MeanRows(p, mask.block_size);
    a.mean_rows_each = static_cast<int>(DivUp<int64_t>(p.max_seqlen_k, mask.block_size));
    a.mean_stride[1] = p.head_dim;
    a.mean_stride[2] = a.mean_rows * p.head_dim;
  }
  a.k_data = p.k.data;
  a.v_data = p.v.data;
  a.v_mean_data = means.v;
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
  a.counter = counter_;
  a.batch = p.batch;
  a.kv_heads = p.kv_heads;
  a.section_heads = SectionHeads(p);
  a.head_dim = p.head_dim;
  a.block_size = mask.block_size;
  while (1 << a.chunk_shift < chunk_) ++a.chunk_shift;
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
  a.exponent_scale = ExponentScale(p);
  a.mean_bias_log2 = std::log2(static_cast<float>(mask.block_size));
  a.mean_bias = a.mean_bias_log2 / a.exponent_scale;
  a.minus_one = -1;
}

cudaError_t AttendPlan::MakeMaps(const Output& output, const Means& means, AttendParams& a) const {
  const Problem& p = *p_;
  const bool packed = p.cu_seqlens_q != nullptr;
  TensorMapShape rows{{p.head_dim, p.q_heads, packed ? p.total_q : p.max_seqlen_q, packed ? 1 : p.batch},
                      {p.q.stride[2], p.q.stride[1], p.q.stride[0]},
                      a.heads_per_tile,
                      a.tile_tokens};
  if (cudaError_t e = MakeTensorMap(&a.q, p.q.data, p.q.dtype, rows)) return e;

  // Whole tokens of 16 rows of the output, if its strides can be a tensor map's.
  const Tensor& out = output.out;
  for (int i = 0; i < 3; ++i) {
    rows.stride[i] = out.stride[2 - i];
    a.bulk_out &= rows.size[i + 1] <= 1 || out.stride[2 - i] > 0;
  }
  rows.box_tokens = 16 / a.heads_per_tile;
  if (a.bulk_out) {
    if (cudaError_t e = MakeTensorMap(&a.out_map, out.data, out.dtype, rows)) return e;
  }
  if (!gathers_) {
    if (cudaError_t e = MakeTensorMap(&a.k, p.k.data, p.k.dtype, KeyShape(p, p.k, chunk_))) return e;
    if (cudaError_t e = MakeTensorMap(&a.v, p.v.data, p.v.dtype, KeyShape(p, p.v, chunk_))) return e;
  }
  if (!mask_->mean_correction) return cudaSuccess;
  TensorMapShape blocks{
      {p.head_dim, p.kv_heads, a.mean_rows, 1}, {a.mean_stride[2], a.mean_stride[1], 0}, 1, KeysPerStep(p.head_dim)};
  if (cudaError_t e = MakeTensorMap(&a.k_mean, means.k, p.k.dtype, blocks)) return e;
  if (cudaError_t e = MakeTensorMap(&a.v_mean, means.v, p.k.dtype, blocks)) return e;
  blocks.box_tokens = kMeanPartRows;
  return MakeTensorMap(&a.v_mean_part, means.v, p.k.dtype, blocks);
}

cudaError_t AttendPlan::Launch(const Output& output, const Means& means, bool follows_select, bool uneven,
                               cudaStream_t stream) const {
  const Problem& p = *p_;
  if (p.batch == 0 || p.total_q == 0) return cudaSuccess;
  AttendParams a{};
  FillParams(output, means, a);
  if (cudaError_t e = MakeMaps(output, means, a)) return e;

  const AttendKernelSet kernels =
      p.q.dtype == FP_BF16 ? PickKernels<__nv_bfloat16>(p.head_dim) : PickKernels<__half>(p.head_dim);
  // One warp needs some 100 ns per bulk copy, and a tile has two per chunk (at d128) of K and of V.
  const bool four_warps = KeysPerStep(p.head_dim) / chunk_ >= 4;
  const AttendKernel kernel = gathers_ ? kernels.rows : four_warps ? kernels.chunks : kernels.tiles;
  int processors = 0;
  if (cudaError_t e = CountProcessors(&processors)) return e;
  if (cudaError_t e = AllowShared(kernel, kernels.shared_bytes)) return e;
  const int64_t items = MaxItems();
  if (order_ && uneven && mask_->counts && items > processors) {
    a.order = order_;
    a.ordered_items = static_cast<int>(items);
    if (cudaError_t e = LaunchOrder(a, mask_->counts, order_, follows_select, stream)) return e;
  } else if (!follows_select) {
    if (cudaError_t e = LaunchAttendStart(counter_, stream)) return e;
  }
  return LaunchOverlapped(kernel, true, std::min<int64_t>(items, processors), kAttendThreads, kernels.shared_bytes,
                          stream, a);
}

} // namespace flashprefill::cuda
