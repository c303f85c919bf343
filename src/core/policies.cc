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
                                 .reserved = 0,
                                 .heads = nullptr};
      return;
    default:
      return;
  }
}

} // namespace flashprefill
