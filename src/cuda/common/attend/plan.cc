// Host side of attend: limits, kernel arguments, launch. See plan.h.
#include "cuda/common/attend/plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/key_list.h"
#include "cuda/common/attend/order.h"
#include "cuda/common/heuristics.h"
#include "cuda/common/launch.h"
#include "cuda/common/tensor_access.h"

namespace flashprefill::cuda {
namespace {

// KV heads that are worked on together: as many as leave their K and V in L2. Together, the end of the work is evened
// out better.
int SectionHeads(const Problem& p, const Gpu& gpu) {
  const int64_t head_bytes = std::max<int64_t>(1, p.max_seqlen_k) * p.head_dim * 4;
  int heads = p.kv_heads;
  while (heads > 1 && (p.kv_heads % heads != 0 || heads * head_bytes > SectionBytes(gpu))) --heads;
  return heads;
}

// Sequences' keys that 32-bit numbers of 16 bytes reach, from the sequence's first on (or from the first page).
bool IsNear(const Problem& p, const Tensor& t) {
  const int64_t most = int64_t{1} << 35; // elements
  if (p.block_table) return p.page_count == 0 || t.stride[0] <= most / p.page_count;
  return t.stride[1] <= most / std::max<int64_t>(1, p.max_seqlen_k);
}

// How often a query tile visits a block of keys, if it keeps 24 of them: a guess, since lengths and masks are the
// device's.
int64_t ExpectedVisits(const Problem& p) {
  constexpr int64_t kKept = 24;
  const int64_t tiles = DivUp<int64_t>(p.total_q, kTileRows) * (p.q_heads / p.kv_heads);
  const int64_t blocks = DivUp<int64_t>(p.max_seqlen_k, kTileRows);
  return tiles * std::min(kKept, blocks) / std::max<int64_t>(1, p.batch * blocks);
}

AttendArgs ArgsOf(const AttendCall& call, int* counter) {
  const Problem& p = call.p;
  const BlockMask& mask = call.mask;
  const Output& output = call.output;
  AttendArgs a{};
  a.group = p.q_heads / p.kv_heads;
  a.heads_per_tile = mask.share_heads ? a.group : 1;
  a.token_of_row = (65536 + a.heads_per_tile - 1) / a.heads_per_tile;
  a.tile_tokens = mask.tile_tokens;
  if (mask.mean_correction) {
    a.mean_rows = MeanRows(p, mask.block_size);
    a.mean_rows_each = static_cast<int>(DivUp<int64_t>(p.max_seqlen_k, mask.block_size));
    a.mean_stride[1] = p.head_dim;
    a.mean_stride[2] = a.mean_rows * p.head_dim;
  }
  a.k_data = p.k.data;
  a.v_data = p.v.data;
  a.k_mean_data = call.means.k;
  a.v_mean_data = call.means.v;
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
  a.counter = counter;
  a.batch = p.batch;
  a.kv_heads = p.kv_heads;
  a.section_heads = SectionHeads(p, call.gpu);
  a.head_dim = p.head_dim;
  a.block_size = mask.block_size;
  a.page_size = p.block_table ? p.page_size : 0;
  a.page_count = static_cast<int>(std::min<int64_t>(p.page_count, std::numeric_limits<int32_t>::max()));
  a.pages_per_seq = p.pages_per_seq;
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
  return a;
}

} // namespace

ListArgs ListArgs::Of(const BlockMask& mask) {
  ListArgs a{};
  if (!HasKeyLists(mask)) return a;
  a.lists = mask.key_lists;
  a.segment_rows = mask.segment_rows;
  a.stride = KeyListStride(mask);
  a.max_keys = mask.max_keys;
  a.by_segment_tokens = Divider::Of(SegmentTokens(mask));
  a.by_segment_tiles = Divider::Of(mask.segment_tiles);
  return a;
}

AttendPlan AttendPlan::Of(const Problem& p, const BlockMask& mask, const Gpu& gpu, int32_t math) {
  AttendPlan plan;
  plan.p_ = &p;
  plan.mask_ = &mask;
  plan.gpu_ = gpu;
  const int64_t items = plan.MaxItems(), most = gpu.portable ? kMaxOrderedItemsPortable : kMaxOrderedItems;
  if (items <= most && items * p.max_seqlen_k >= kMinOrderedWork) plan.ordered_items_ = items;
  plan.keys_ = plan.KeysFor(math);
  return plan;
}

AttendPlan::Keys AttendPlan::KeysFor(int32_t math) const {
  const Problem& p = *p_;
  // Lists are read by rows from wherever their keys lie.
  if (gpu_.portable || mask_->max_keys > 0 || p.batch == 0 || p.total_q == 0) return Keys::kInPlace;
  const int together = p.block_table ? ChunkKeys(mask_->block_size | p.page_size, kTileRows) : kTileRows;
  // One warp sends a step's copies there: of 16 keys each they would take longer than the step.
  if (mask_->skip > 0) return together < kSkipPageKeys ? Keys::kCopied : Keys::kInPlace;
  // Products of 64 columns leave exponentials the limit, and a step of 256 does not fit the registers.
  const bool dimension = p.head_dim > 64 && p.head_dim <= kImageColumns;
  if (math == FP_MATH_8BIT && dimension && mask_->block_size % kImageKeys == 0) return Keys::kImages;
  return together < kBulkPageKeys && ExpectedVisits(p) >= kCopyFromVisits ? Keys::kCopied : Keys::kInPlace;
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
  if (mask_->max_keys > 0 && mask_->mean_correction) return "no mean correction in masks with key lists on CUDA";
  if (mask_->skip > 0 && gpu_.portable) return "masks that skip are for Hopper's kernels and the CPU";
  if (mask_->skip > 0 && p.head_dim > 128) return "a head_dim of at most 128 in masks that skip on CUDA";
  if (mask_->tile_tokens < 1) return "a shared mask takes groups of at most 128 query heads";
  if (!FewTokens(p)) return "fewer than 2^30 tokens on CUDA";
  if ((p.block_table || gpu_.portable || mask_->max_keys > 0) && !(IsNear(p, p.k) && IsNear(p, p.v))) {
    return p.block_table   ? "a paged cache of at most 2^35 elements on CUDA"
           : gpu_.portable ? "a sequence whose keys span at most 2^35 elements on this GPU"
                           : "a sequence whose keys span at most 2^35 elements where the mask has key lists";
  }
  if (!IsAligned(p.q)) return kUnalignedQ;
  if (!IsAligned(p.k)) return kUnalignedK;
  if (!IsAligned(p.v)) return kUnalignedV;
  if (output && !IsAligned(output->out)) return kUnalignedOut;
  return nullptr;
}

cudaError_t AttendPlan::Launch(const Output& output, const Means& means, bool follows_select, bool uneven,
                               cudaStream_t stream, const std::function<cudaError_t()>& beside) const {
  if (p_->batch == 0 || p_->total_q == 0) return beside ? beside() : cudaSuccess;
  if (keys_ == Keys::kCopied) {
    if (cudaError_t e = LaunchKeyCopy(*p_, copy_, stream)) return e;
  }
  const Problem p = keys_ == Keys::kCopied ? copy_.Over(*p_) : *p_;
  const AttendCall call{p, *mask_, gpu_, output, means, MaxItems(), static_cast<bool>(beside)};
  AttendArgs args = ArgsOf(call, counter_);
  if (keys_ == Keys::kImages) {
    if (cudaError_t e = LaunchImages(args, images_, p, stream)) return e;
  }
  int processors = 0;
  if (cudaError_t e = CountProcessors(&processors)) return e;
  if (order_ && uneven && mask_->counts && call.items > processors) {
    args.order = order_;
    args.ordered_items = static_cast<int>(call.items);
    if (cudaError_t e = LaunchOrder(args, mask_->counts, order_, follows_select, stream)) return e;
  } else if (!follows_select) {
    if (cudaError_t e = LaunchAttendStart(counter_, stream)) return e;
  }
  if (beside) {
    if (cudaError_t e = beside()) return e;
  }
  if (gpu_.portable) return LaunchAttendPortable(args, call, stream);
  if (keys_ == Keys::kImages) return LaunchAttend8Sm90(args, call, images_, stream);
  return LaunchAttendSm90(args, call, stream);
}

} // namespace flashprefill::cuda
