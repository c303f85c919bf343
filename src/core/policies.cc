// The published defaults. FlashPrefill's blocks of 128, 2 sink, 4 window and 2 dense tail blocks are those of all
// models that its authors configure; alpha = 0.12 is their value for Qwen3-30B-A3B, between Llama's 0.18 and Qwen2.5's
// 0.08.
#include "core/policies.h"

#include <cmath>
#include <limits>
#include <new>

#include "flashprefill/flashprefill.h"

namespace flashprefill {
namespace {

fp_policy Common(int32_t kind, size_t size) {
  return {.struct_size = static_cast<uint32_t>(size),
          .kind = kind,
          .block_size = 128,
          .sink_blocks = 2,
          .window_blocks = 4,
          .dense_tail_blocks = 2,
          .share_heads = 0,
          .mean_correction = 0};
}

fp_policy Unforced(fp_policy common, int32_t block_size = 128) {
  common.block_size = block_size;
  common.sink_blocks = common.window_blocks = common.dense_tail_blocks = 0;
  return common;
}

fp_policy WithSink(fp_policy common, int32_t window_blocks) {
  common = Unforced(common);
  common.sink_blocks = 1;
  common.window_blocks = window_blocks;
  return common;
}

} // namespace

size_t PolicySize(int32_t kind) {
  switch (kind) {
    case FP_DENSE:
      return sizeof(fp_dense);
    case FP_STREAMING:
      return sizeof(fp_streaming);
    case FP_FLASHPREFILL:
      return sizeof(fp_flashprefill);
    case FP_SKETCH:
      return sizeof(fp_sketch);
    case FP_FLEXPREFILL:
      return sizeof(fp_flexprefill);
    case FP_MINFERENCE:
      return sizeof(fp_minference);
    case FP_XATTENTION:
      return sizeof(fp_xattention);
    case FP_RRATTENTION:
      return sizeof(fp_rrattention);
    case FP_SPARGE_ATTN:
      return sizeof(fp_sparge_attn);
    case FP_PRISM:
      return sizeof(fp_prism);
    case FP_SAMPLE_ATTENTION:
      return sizeof(fp_sample_attention);
    default:
      return 0;
  }
}

void InitPolicy(int32_t kind, void* policy) {
  const fp_policy common = Common(kind, PolicySize(kind));
  switch (kind) {
    case FP_DENSE:
      new (policy) fp_dense{common};
      return;
    case FP_STREAMING:
      new (policy) fp_streaming{common};
      return;
    case FP_FLASHPREFILL:
      new (policy) fp_flashprefill{.common = common, .alpha = 0.12f, .query_pool = 1, .min_blocks = 0, .reserved = 0};
      return;
    case FP_SKETCH:
      new (policy) fp_sketch{.common = common,
                             .alpha = std::numeric_limits<float>::quiet_NaN(),
                             .mass = 0.95f,
                             .outliers = 4,
                             .query_pool = 16,
                             .min_blocks = 0,
                             .gain = std::numeric_limits<float>::quiet_NaN(),
                             .query_metric = 0,
                             .reserved = 0};
      return;
    case FP_FLEXPREFILL: // gamma, tau and min_budget of its authors' example; nothing is forced but what it forces
                         // itself
      new (policy) fp_flexprefill{.common = Unforced(common),
                                  .gamma = 0.9f,
                                  .tau = 0.1f,
                                  .min_budget = 512,
                                  .max_budget = 0,
                                  .cover = FP_COVER_FIRST,
                                  .reserved = 0};
      return;
    case FP_MINFERENCE: // what it uses for heads that its tables don't know, over its kernels' blocks
      new (policy) fp_minference{.common = Unforced(common, 64),
                                 .vertical = 1000,
                                 .slash = 6096,
                                 .head_count = 0,
                                 .rounding = FP_ROUND_BLOCKS,
                                 .heads = nullptr};
      return;
    case FP_XATTENTION: // the paper's S = 16; its mandatory blocks are the first one and the diagonal
      new (policy) fp_xattention{.common = WithSink(common, 1),
                                 .threshold = 0.9f,
                                 .norm = 1,
                                 .stride = 16,
                                 .head_count = 0,
                                 .head_thresholds = nullptr};
      return;
    case FP_RRATTENTION: // the more careful of its two settings; keep_sink and keep_recent
      new (policy) fp_rrattention{.common = WithSink(common, 1), .threshold = 0.95f, .stride = 8};
      return;
    case FP_SPARGE_ATTN: // its cdf interface; its kernels take blocks of 64 keys
      new (policy) fp_sparge_attn{.common = Unforced(common, 64),
                                  .similarity = 0.6f,
                                  .cdf = 0.98f,
                                  .topk = std::numeric_limits<float>::quiet_NaN(),
                                  .reserved = 0};
      return;
    case FP_PRISM: // sink and recent blocks are forced; how many, we chose
      new (policy) fp_prism{.common = WithSink(common, 2),
                            .mass = 0.95f,
                            .rotary_dim = 0,
                            .high_pairs = 0,
                            .low_pairs = 0,
                            .interleaved = 0,
                            .reserved = 0};
      return;
    case FP_SAMPLE_ATTENTION: // the paper's alpha, row ratio and window; rows a segment we chose
      new (policy) fp_sample_attention{.common = WithSink(common, 1),
                                       .coverage = 0.95f,
                                       .sample_ratio = 0.05f,
                                       .window_ratio = 0.08f,
                                       .sample_rows = 32};
      return;
    default:
      return;
  }
}

} // namespace flashprefill
