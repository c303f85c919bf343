// Bad input over the C ABI: each kind is refused with one line that names the argument, its value and what it must be,
// before anything is written.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "flashprefill/flashprefill.h"

namespace {

constexpr int kBatch = 2, kTokens = 40, kHeads = 4, kKvHeads = 2, kDim = 16, kPage = 16, kPages = 6;
constexpr float kCanary = 12345.0f;

union AnyPolicy {
  fp_policy common;
  fp_flashprefill flashprefill;
  fp_sketch sketch;
  fp_flexprefill flex;
  fp_minference minference;
  fp_xattention xattention;
  fp_rrattention rrattention;
  fp_sparge_attn sparge;
  fp_prism prism;
  fp_sample_attention sample;
};

// A call that is right; each case breaks one thing of it.
struct Call {
  Call() {
    fp_problem_init(&problem);
    problem.batch = kBatch;
    problem.q_heads = kHeads;
    problem.kv_heads = kKvHeads;
    problem.head_dim = kDim;
    problem.softmax_scale = 0.25f;
    problem.total_q = kBatch * kTokens;
    problem.max_seqlen_q = problem.max_seqlen_k = kTokens;
    problem.q = Contiguous(q.data(), kTokens, kHeads);
    problem.k = Contiguous(k.data(), kTokens, kKvHeads);
    problem.v = Contiguous(v.data(), kTokens, kKvHeads);
    fp_policy_init(FP_FLASHPREFILL, &policy, sizeof policy);
    fp_output_init(&output);
    output.out = Contiguous(out.data(), kTokens, kHeads);
    output.lse = lse.data();
    output.lse_stride[0] = kHeads * kTokens;
    output.lse_stride[1] = kTokens;
    output.lse_stride[2] = 1;
    fp_exec_init(&exec);
    fp_block_mask_init(&mask);
    EXPECT_EQ(fp_mask_describe(&problem, &policy.common, &mask), FP_OK);
    bits.resize(mask.heads * mask.tile_rows * mask.words);
    mask.bits = bits.data();
    EXPECT_EQ(fp_prefill_workspace(&problem, &policy.common, &exec, &workspace_bytes), FP_OK);
    memory.resize(workspace_bytes + 128);
    workspace = Align(memory.data());
  }

  static fp_tensor Contiguous(float* data, int64_t tokens, int64_t heads) {
    fp_tensor t{};
    t.data = data;
    t.dtype = FP_F32;
    t.stride[0] = tokens * heads * kDim;
    t.stride[1] = heads * kDim;
    t.stride[2] = kDim;
    t.stride[3] = 1;
    return t;
  }
  static void* Align(uint8_t* p) { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); }

  void MakePacked() {
    problem.cu_seqlens_q = cu_q.data();
    problem.cu_seqlens_k = cu_k.data();
    problem.total_k = kBatch * kTokens;
  }
  void MakePaged() { // 2 x 40 keys in pages of 16
    problem.block_table = table.data();
    problem.block_table_stride = problem.pages_per_seq = 3;
    problem.page_size = kPage;
    problem.page_count = kPages;
    problem.seqused_k = used.data();
    problem.k.stride[0] = problem.v.stride[0] = kPage * kKvHeads * kDim;
  }
  void MakeFlexPrefill() { fp_policy_init(FP_FLEXPREFILL, &policy, sizeof policy); }
  void MakeMInference() { fp_policy_init(FP_MINFERENCE, &policy, sizeof policy); }
  void Make(int32_t kind) { fp_policy_init(kind, &policy, sizeof policy); }
  void MakeSketch() { fp_policy_init(FP_SKETCH, &policy, sizeof policy); }

  fp_status Prefill() {
    return fp_prefill(&problem, &policy.common, &exec, use_mask ? &mask : nullptr, &output, workspace, workspace_bytes);
  }

  std::vector<float> q = std::vector<float>(kBatch * kTokens * kHeads * kDim, 0.1f);
  std::vector<float> k = std::vector<float>(kPages * kPage * kKvHeads * kDim, 0.1f), v = k;
  std::vector<float> out = std::vector<float>(q.size(), kCanary);
  std::vector<float> lse = std::vector<float>(kBatch * kTokens * kHeads, kCanary);
  std::vector<int32_t> cu_q{0, 30, 80}, cu_k{0, 30, 80}, used{40, 40}, table{0, 2, 4, 5, 3, 1};
  std::vector<uint64_t> bits;
  std::vector<uint8_t> memory;
  fp_problem problem;
  AnyPolicy policy;
  fp_output output;
  fp_exec exec;
  fp_block_mask mask;
  bool use_mask = false;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
};

struct Refusal {
  const char* name;
  std::function<void(Call&)> breaks;
  std::vector<const char*> says; // all of these stand in the message
  fp_status status = FP_INVALID_ARGUMENT;
};

void PrintTo(const Refusal& r, std::ostream* os) { *os << r.name; }

const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInf = std::numeric_limits<float>::infinity();

const std::vector<Refusal>& Refusals() {
  static const std::vector<Refusal> all = {
      {"problem_size", [](Call& c) { c.problem.struct_size = 8; }, {"problem.struct_size is 8", "fp_*_init"}},
      {"device", [](Call& c) { c.problem.device = 7; }, {"device is 7", "from 0 to 1"}},
      {"cuda_without_backend", [](Call& c) { c.problem.device = FP_CUDA; }, {"FP_CUDA", "no backend"}, FP_UNSUPPORTED},
      {"batch", [](Call& c) { c.problem.batch = -1; }, {"batch is -1"}},
      {"kv_heads_zero", [](Call& c) { c.problem.kv_heads = 0; }, {"kv_heads is 0"}},
      {"q_heads_zero", [](Call& c) { c.problem.q_heads = 0; }, {"q_heads is 0"}},
      {"q_heads_not_multiple", [](Call& c) { c.problem.q_heads = 5; }, {"q_heads is 5", "multiple of kv_heads (2)"}},
      {"head_dim_zero", [](Call& c) { c.problem.head_dim = 0; }, {"head_dim is 0", "from 1 to 512"}},
      {"head_dim_large", [](Call& c) { c.problem.head_dim = 513; }, {"head_dim is 513"}},
      {"causal", [](Call& c) { c.problem.causal = 2; }, {"causal is 2", "0 or 1"}},
      {"causal_off_with_policy", [](Call& c) { c.problem.causal = 0; }, {"causal is 0", "Dense"}},
      {"final_chunk", [](Call& c) { c.problem.final_chunk = -3; }, {"final_chunk is -3"}},
      {"scale_zero", [](Call& c) { c.problem.softmax_scale = 0; }, {"softmax_scale is 0", "above 0"}},
      {"scale_negative", [](Call& c) { c.problem.softmax_scale = -1; }, {"softmax_scale is -1"}},
      {"scale_nan", [](Call& c) { c.problem.softmax_scale = kNan; }, {"softmax_scale is nan"}},
      {"scale_inf", [](Call& c) { c.problem.softmax_scale = kInf; }, {"softmax_scale is inf"}},
      {"total_q", [](Call& c) { c.problem.total_q = 81; }, {"total_q is 81", "(80)"}},
      {"total_q_negative", [](Call& c) { c.problem.total_q = -1; }, {"total_q is -1"}},
      {"max_seqlen_q", [](Call& c) { c.problem.max_seqlen_q = -1; }, {"max_seqlen_q is -1"}},
      {"max_seqlen_k", [](Call& c) { c.problem.max_seqlen_k = int64_t{1} << 40; }, {"max_seqlen_k is 1099511627776"}},
      {"fewer_keys", [](Call& c) { c.problem.max_seqlen_k = 39; }, {"max_seqlen_k is 39", "max_seqlen_q (40)"}},
      {"q_dtype", [](Call& c) { c.problem.q.dtype = 9; }, {"q.dtype is 9"}},
      {"k_dtype", [](Call& c) { c.problem.k.dtype = -1; }, {"k.dtype is -1"}},
      {"v_dtype", [](Call& c) { c.problem.v.dtype = 3; }, {"v.dtype is 3"}},
      {"q_null", [](Call& c) { c.problem.q.data = nullptr; }, {"q.data is NULL"}},
      {"k_null", [](Call& c) { c.problem.k.data = nullptr; }, {"k.data is NULL"}},
      {"v_null", [](Call& c) { c.problem.v.data = nullptr; }, {"v.data is NULL"}},
      {"q_misaligned",
       [](Call& c) { c.problem.q.data = reinterpret_cast<char*>(c.q.data()) + 1; },
       {"q.data is 0x", "aligned"}},
      {"stride_huge", [](Call& c) { c.problem.k.stride[1] = int64_t{1} << 60; }, {"k.stride[1]", "address space"}},
      {"cu_q_start", [](Call& c) { c.MakePacked(), c.cu_q[0] = 1; }, {"cu_seqlens_q[0] is 1", "must be 0"}},
      {"cu_q_falls", [](Call& c) { c.MakePacked(), c.cu_q[1] = -5; }, {"cu_seqlens_q[1] is -5", "at least"}},
      {"cu_q_too_long",
       [](Call& c) { c.MakePacked(), c.cu_q[1] = 60; },
       {"cu_seqlens_q[1] is 60", "max_seqlen_q (40)"}},
      {"cu_q_end",
       [](Call& c) { c.MakePacked(), c.problem.total_q = 79, c.problem.max_seqlen_q = c.problem.max_seqlen_k = 50; },
       {"cu_seqlens_q[2] is 80", "(79)"}},
      {"cu_k_falls",
       [](Call& c) { c.MakePacked(), c.problem.max_seqlen_q = c.problem.max_seqlen_k = 90, c.cu_k[1] = 85; },
       {"cu_seqlens_k[2] is 80", "at least"}},
      {"cu_k_end",
       [](Call& c) { c.MakePacked(), c.problem.max_seqlen_q = c.problem.max_seqlen_k = 50, c.problem.total_k = 70; },
       {"cu_seqlens_k[2] is 80", "(70)"}},
      {"packed_fewer_keys",
       [](Call& c) { c.MakePacked(), c.problem.max_seqlen_q = c.problem.max_seqlen_k = 60, c.cu_k[1] = 29; },
       {"number of keys of sequence 0 is 29", "(30)"}},
      {"seqused_negative",
       [](Call& c) { c.problem.seqused_k = c.used.data(), c.used[1] = -1; },
       {"seqused_k[1] is -1"}},
      {"seqused_large",
       [](Call& c) { c.problem.seqused_k = c.used.data(), c.used[0] = 41; },
       {"seqused_k[0] is 41", "to 40"}},
      {"seqused_short",
       [](Call& c) { c.problem.seqused_k = c.used.data(), c.used[0] = 39; },
       {"number of keys of sequence 0 is 39"}},
      {"page_size", [](Call& c) { c.MakePaged(), c.problem.page_size = 0; }, {"page_size is 0"}},
      {"pages_per_seq",
       [](Call& c) { c.MakePaged(), c.problem.pages_per_seq = 2; },
       {"block_table's number of columns is 2"}},
      {"pages_negative", [](Call& c) { c.MakePaged(), c.problem.pages_per_seq = -2; }, {"pages_per_seq is -2"}},
      {"table_stride", [](Call& c) { c.MakePaged(), c.problem.block_table_stride = 1; }, {"block_table_stride is 1"}},
      {"page_beyond", [](Call& c) { c.MakePaged(), c.table[4] = 6; }, {"block_table[1][1] is 6", "0 to 5"}},
      {"page_negative", [](Call& c) { c.MakePaged(), c.table[0] = -1; }, {"block_table[0][0] is -1"}},
      {"paged_no_lengths", [](Call& c) { c.MakePaged(), c.problem.seqused_k = nullptr; }, {"seqused_k is NULL"}},
      {"policy_kind", [](Call& c) { c.policy.common.kind = 77; }, {"policy.kind is 77"}},
      {"policy_size", [](Call& c) { c.policy.common.struct_size = 4; }, {"policy.struct_size is 4"}},
      {"block_size_odd", [](Call& c) { c.policy.common.block_size = 100; }, {"block_size is 100", "multiple of 16"}},
      {"block_size_zero", [](Call& c) { c.policy.common.block_size = 0; }, {"block_size is 0"}},
      {"block_size_large", [](Call& c) { c.policy.common.block_size = 2048; }, {"block_size is 2048"}},
      {"sink", [](Call& c) { c.policy.common.sink_blocks = -1; }, {"sink_blocks is -1"}},
      {"window", [](Call& c) { c.policy.common.window_blocks = -1; }, {"window_blocks is -1"}},
      {"tail", [](Call& c) { c.policy.common.dense_tail_blocks = 1 << 30; }, {"dense_tail_blocks is 1073741824"}},
      {"share_heads", [](Call& c) { c.policy.common.share_heads = 2; }, {"share_heads is 2"}},
      {"share_heads_group",
       [](Call& c) { c.policy.common.share_heads = 1, c.problem.q_heads = 2 * 129; },
       {"share_heads is 1", "128 query heads"}},
      {"mean_correction", [](Call& c) { c.policy.common.mean_correction = 9; }, {"mean_correction is 9"}},
      {"alpha_negative", [](Call& c) { c.policy.flashprefill.alpha = -0.1f; }, {"alpha is -0.1"}},
      {"alpha_nan", [](Call& c) { c.policy.flashprefill.alpha = kNan; }, {"alpha is nan"}},
      {"alpha_inf", [](Call& c) { c.policy.flashprefill.alpha = kInf; }, {"alpha is inf"}},
      {"query_pool", [](Call& c) { c.policy.flashprefill.query_pool = 0; }, {"query_pool is 0", "1 to 128"}},
      {"min_blocks", [](Call& c) { c.policy.flashprefill.min_blocks = -1; }, {"min_blocks is -1"}},
      {"sketch_mass_zero", [](Call& c) { c.MakeSketch(), c.policy.sketch.mass = 0; }, {"mass is 0", "above 0"}},
      {"sketch_mass_large", [](Call& c) { c.MakeSketch(), c.policy.sketch.mass = 1.5f; }, {"mass is 1.5"}},
      {"sketch_both", [](Call& c) { c.MakeSketch(), c.policy.sketch.alpha = 0.5f; }, {"mass is 0.95", "one decides"}},
      {"sketch_neither", [](Call& c) { c.MakeSketch(), c.policy.sketch.mass = kNan; }, {"mass is nan", "one decides"}},
      {"sketch_mass_and_gain",
       [](Call& c) { c.MakeSketch(), c.policy.sketch.gain = 0.1f; },
       {"mass is 0.95", "one decides"}},
      {"sketch_gain",
       [](Call& c) { c.MakeSketch(), c.policy.sketch.mass = kNan, c.policy.sketch.gain = 1; },
       {"gain is 1", "below 1"}},
      {"sketch_metric", [](Call& c) { c.MakeSketch(), c.policy.sketch.query_metric = 2; }, {"query_metric is 2"}},
      {"sketch_outliers", [](Call& c) { c.MakeSketch(), c.policy.sketch.outliers = 17; }, {"outliers is 17"}},
      {"flex_gamma_zero", [](Call& c) { c.MakeFlexPrefill(), c.policy.flex.gamma = 0; }, {"gamma is 0", "above 0"}},
      {"flex_gamma_nan", [](Call& c) { c.MakeFlexPrefill(), c.policy.flex.gamma = kNan; }, {"gamma is nan"}},
      {"flex_tau", [](Call& c) { c.MakeFlexPrefill(), c.policy.flex.tau = -1; }, {"tau is -1", "at least 0"}},
      {"flex_min", [](Call& c) { c.MakeFlexPrefill(), c.policy.flex.min_budget = -1; }, {"min_budget is -1"}},
      {"flex_max",
       [](Call& c) { c.MakeFlexPrefill(), c.policy.flex.max_budget = 511; },
       {"max_budget is 511", "at least min_budget (512)"}},
      {"flex_cover", [](Call& c) { c.MakeFlexPrefill(), c.policy.flex.cover = 2; }, {"cover is 2", "0 to 1"}},
      {"flex_shared",
       [](Call& c) { c.MakeFlexPrefill(), c.policy.common.share_heads = 1; },
       {"share_heads is 1", "list of its own"}},
      {"minference_vertical",
       [](Call& c) { c.MakeMInference(), c.policy.minference.vertical = -5; },
       {"vertical is -5"}},
      {"minference_count",
       [](Call& c) { c.MakeMInference(), c.policy.minference.head_count = 99; },
       {"head_count is 99", "q_heads"}},
      {"minference_heads",
       [](Call& c) { c.MakeMInference(), c.policy.minference.head_count = c.problem.q_heads; },
       {"heads is NULL"}},
      {"minference_pattern",
       [](Call& c) {
         static const fp_minference_head heads[64] = {{FP_A_SHAPE, 1, 2}, {7, 1, 2}};
         c.MakeMInference();
         c.policy.minference.head_count = c.problem.q_heads;
         c.policy.minference.heads = heads;
       },
       {"heads[1].pattern is 7", "0 to 2"}},
      {"minference_rounding",
       [](Call& c) { c.MakeMInference(), c.policy.minference.rounding = 3; },
       {"rounding is 3", "0 to 1"}},
      {"minference_corrected",
       [](Call& c) {
         c.MakeMInference(), c.policy.minference.rounding = FP_ROUND_TOKENS, c.policy.common.mean_correction = 1;
       },
       {"mean_correction is 1", "FP_ROUND_TOKENS"}},
      {"mask_lines_room",
       [](Call& c) {
         static int32_t lines[7];
         c.use_mask = true, c.mask.max_verticals = 5, c.mask.vertical_slash = lines;
       },
       {"mask.max_verticals is 5", "policy's (0)"}},
      {"mask_lines_null", [](Call& c) { c.use_mask = true, c.mask.max_slashes = 5; }, {"mask.vertical_slash is NULL"}},
      {"minference_shared",
       [](Call& c) { c.MakeMInference(), c.policy.common.share_heads = 1; },
       {"share_heads is 1", "list of its own"}},
      {"xattention_threshold",
       [](Call& c) { c.Make(FP_XATTENTION), c.policy.xattention.threshold = 1.5f; },
       {"threshold is 1.5", "at most 1"}},
      {"xattention_norm", [](Call& c) { c.Make(FP_XATTENTION), c.policy.xattention.norm = 0; }, {"norm is 0"}},
      {"xattention_stride",
       [](Call& c) { c.Make(FP_XATTENTION), c.policy.xattention.stride = 12; },
       {"stride is 12", "4, 8, 16"}},
      {"xattention_stride_of_block",
       [](Call& c) { c.Make(FP_XATTENTION), c.policy.common.block_size = 48, c.policy.xattention.stride = 32; },
       {"stride is 32", "divisor of block_size (48)"}},
      {"xattention_count",
       [](Call& c) { c.Make(FP_XATTENTION), c.policy.xattention.head_count = 99; },
       {"head_count is 99", "q_heads"}},
      {"xattention_list",
       [](Call& c) { c.Make(FP_XATTENTION), c.policy.xattention.head_count = c.problem.q_heads; },
       {"head_thresholds is NULL"}},
      {"xattention_list_value",
       [](Call& c) {
         static const float thresholds[64] = {0.5f, -1};
         c.Make(FP_XATTENTION);
         c.policy.xattention.head_count = c.problem.q_heads;
         c.policy.xattention.head_thresholds = thresholds;
       },
       {"head_thresholds[1] is -1"}},
      {"xattention_shared",
       [](Call& c) { c.Make(FP_XATTENTION), c.policy.common.share_heads = 1; },
       {"share_heads is 1", "list of its own"}},
      {"rrattention_threshold",
       [](Call& c) { c.Make(FP_RRATTENTION), c.policy.rrattention.threshold = 0; },
       {"threshold is 0", "above 0"}},
      {"rrattention_stride",
       [](Call& c) { c.Make(FP_RRATTENTION), c.policy.rrattention.stride = 256; },
       {"stride is 256"}},
      {"rrattention_shared",
       [](Call& c) { c.Make(FP_RRATTENTION), c.policy.common.share_heads = 1; },
       {"share_heads is 1", "list of its own"}},
      {"sparge_similarity",
       [](Call& c) { c.Make(FP_SPARGE_ATTN), c.policy.sparge.similarity = kNan; },
       {"similarity is nan", "at least -1"}},
      {"sparge_both",
       [](Call& c) { c.Make(FP_SPARGE_ATTN), c.policy.sparge.topk = 0.5f; },
       {"cdf is 0.98", "one of the two"}},
      {"sparge_cdf", [](Call& c) { c.Make(FP_SPARGE_ATTN), c.policy.sparge.cdf = 2; }, {"cdf is 2", "at most 1"}},
      {"sparge_topk",
       [](Call& c) { c.Make(FP_SPARGE_ATTN), c.policy.sparge.cdf = kNan, c.policy.sparge.topk = -1; },
       {"topk is -1", "at least 0"}},
      {"sparge_shared",
       [](Call& c) { c.Make(FP_SPARGE_ATTN), c.policy.common.share_heads = 1; },
       {"share_heads is 1", "list of its own"}},
      {"prism_mass", [](Call& c) { c.Make(FP_PRISM), c.policy.prism.mass = 0; }, {"mass is 0", "above 0"}},
      {"prism_rotary", [](Call& c) { c.Make(FP_PRISM), c.policy.prism.rotary_dim = 3; }, {"rotary_dim is 3", "even"}},
      {"prism_rotary_large", [](Call& c) { c.Make(FP_PRISM), c.policy.prism.rotary_dim = 600; }, {"rotary_dim is 600"}},
      {"prism_high", [](Call& c) { c.Make(FP_PRISM), c.policy.prism.high_pairs = 300; }, {"high_pairs is 300"}},
      {"prism_low", [](Call& c) { c.Make(FP_PRISM), c.policy.prism.low_pairs = -1; }, {"low_pairs is -1"}},
      {"prism_interleaved", [](Call& c) { c.Make(FP_PRISM), c.policy.prism.interleaved = 2; }, {"interleaved is 2"}},
      {"prism_shared",
       [](Call& c) { c.Make(FP_PRISM), c.policy.common.share_heads = 1; },
       {"share_heads is 1", "list of its own"}},
      {"sample_coverage",
       [](Call& c) { c.Make(FP_SAMPLE_ATTENTION), c.policy.sample.coverage = 0; },
       {"coverage is 0", "above 0"}},
      {"sample_ratio",
       [](Call& c) { c.Make(FP_SAMPLE_ATTENTION), c.policy.sample.sample_ratio = kInf; },
       {"sample_ratio is inf"}},
      {"sample_window",
       [](Call& c) { c.Make(FP_SAMPLE_ATTENTION), c.policy.sample.window_ratio = -0.5f; },
       {"window_ratio is -0.5"}},
      {"sample_rows",
       [](Call& c) { c.Make(FP_SAMPLE_ATTENTION), c.policy.sample.sample_rows = 129; },
       {"sample_rows is 129", "1 to 128"}},
      {"sample_shared",
       [](Call& c) { c.Make(FP_SAMPLE_ATTENTION), c.policy.common.share_heads = 1; },
       {"share_heads is 1", "list of its own"}},
      {"exec_size", [](Call& c) { c.exec.struct_size = 1; }, {"exec.struct_size is 1"}},
      {"threads", [](Call& c) { c.exec.threads = -1; }, {"exec.threads is -1"}},
      {"backend", [](Call& c) { c.exec.backend = "quantum"; }, {"exec.backend is quantum", "reference"}},
      {"target", [](Call& c) { c.exec.target = "avx1024"; }, {"exec.target is avx1024"}},
      {"out_null", [](Call& c) { c.output.out.data = nullptr; }, {"out.data is NULL"}},
      {"out_dtype", [](Call& c) { c.output.out.dtype = FP_BF16; }, {"out.dtype is 1", "q's dtype (0)"}},
      {"out_overlaps", [](Call& c) { c.output.out.stride[2] = 0; }, {"out.stride[2] is 0", "overwrite"}},
      {"out_size", [](Call& c) { c.output.struct_size = 0; }, {"output.struct_size is 0"}},
      {"lse_overlaps", [](Call& c) { c.output.lse_stride[2] = 0; }, {"lse_stride[2] is 0", "overwrite"}},
      {"lse_misaligned",
       [](Call& c) { c.output.lse = reinterpret_cast<float*>(reinterpret_cast<char*>(c.lse.data()) + 2); },
       {"lse is 0x", "aligned to 4"}},
      {"workspace_small", [](Call& c) { c.workspace_bytes = 1; }, {"workspace_bytes is 1", "fp_*_workspace"}},
      {"workspace_null", [](Call& c) { c.workspace = nullptr; }, {"workspace is NULL"}},
      {"workspace_misaligned",
       [](Call& c) { c.workspace = static_cast<char*>(c.workspace) + 8; },
       {"workspace is 0x", "aligned to 64"}},
      {"mask_size", [](Call& c) { c.use_mask = true, c.mask.struct_size = 3; }, {"mask.struct_size is 3"}},
      {"mask_heads", [](Call& c) { c.use_mask = true, c.mask.heads = 3; }, {"mask.heads is 3", "q_heads"}},
      {"mask_rows", [](Call& c) { c.use_mask = true, c.mask.tile_rows = 1; }, {"mask.tile_rows is 1"}},
      {"mask_words", [](Call& c) { c.use_mask = true, c.mask.words = 9; }, {"mask.words is 9"}},
      {"mask_tile", [](Call& c) { c.use_mask = true, c.mask.tile_tokens = 64; }, {"mask.tile_tokens is 64"}},
      {"mask_block", [](Call& c) { c.use_mask = true, c.mask.block_size = 64; }, {"mask.block_size is 64", "policy's"}},
      {"mask_bits", [](Call& c) { c.use_mask = true, c.mask.bits = nullptr; }, {"mask.bits is NULL"}},
  };
  return all;
}

class RefusalTest : public testing::TestWithParam<Refusal> {};

TEST_P(RefusalTest, NamesTheArgumentAndWritesNothing) {
  Call call;
  GetParam().breaks(call);
  ASSERT_EQ(call.Prefill(), GetParam().status);
  const std::string message = fp_last_error();
  for (const char* words : GetParam().says) EXPECT_NE(message.find(words), std::string::npos) << message;
  EXPECT_EQ(message.find('\n'), std::string::npos);
  for (const float x : call.out) ASSERT_EQ(x, kCanary);
  for (const float x : call.lse) ASSERT_EQ(x, kCanary);
  for (const uint64_t word : call.bits) ASSERT_EQ(word, 0u);
}

INSTANTIATE_TEST_SUITE_P(All, RefusalTest, testing::ValuesIn(Refusals()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Refusals, TheUnbrokenCallsRun) {
  Call plain;
  EXPECT_EQ(plain.Prefill(), FP_OK) << fp_last_error();
  EXPECT_NE(plain.out[0], kCanary);
  Call packed;
  packed.MakePacked();
  packed.problem.max_seqlen_q = packed.problem.max_seqlen_k = 50;
  fp_prefill_workspace(&packed.problem, &packed.policy.common, &packed.exec, &packed.workspace_bytes);
  packed.memory.resize(packed.workspace_bytes + 128);
  packed.workspace = Call::Align(packed.memory.data());
  EXPECT_EQ(packed.Prefill(), FP_OK) << fp_last_error();
  Call paged;
  paged.MakePaged();
  paged.MakeSketch();
  fp_prefill_workspace(&paged.problem, &paged.policy.common, &paged.exec, &paged.workspace_bytes);
  paged.memory.resize(paged.workspace_bytes + 128);
  paged.workspace = Call::Align(paged.memory.data());
  EXPECT_EQ(paged.Prefill(), FP_OK) << fp_last_error();
}

TEST(Refusals, NullPointers) {
  Call c;
  size_t bytes = 0;
  EXPECT_EQ(fp_prefill(nullptr, &c.policy.common, nullptr, nullptr, &c.output, nullptr, 0), FP_INVALID_ARGUMENT);
  EXPECT_STREQ(fp_last_error(), "problem is NULL; it must be a problem");
  EXPECT_EQ(fp_prefill(&c.problem, nullptr, nullptr, nullptr, &c.output, nullptr, 0), FP_INVALID_ARGUMENT);
  EXPECT_STREQ(fp_last_error(), "policy is NULL; it must be a policy");
  EXPECT_EQ(fp_prefill(&c.problem, &c.policy.common, nullptr, nullptr, nullptr, nullptr, 0), FP_INVALID_ARGUMENT);
  EXPECT_STREQ(fp_last_error(), "output is NULL; it must be an output");
  EXPECT_EQ(fp_attend_workspace(&c.problem, nullptr, nullptr, &bytes), FP_INVALID_ARGUMENT);
  EXPECT_EQ(fp_select_workspace(&c.problem, &c.policy.common, nullptr, nullptr), FP_INVALID_ARGUMENT);
  EXPECT_EQ(fp_mask_describe(&c.problem, &c.policy.common, nullptr), FP_INVALID_ARGUMENT);
  EXPECT_EQ(fp_mask_stats(&c.problem, &c.mask, nullptr), FP_INVALID_ARGUMENT);
  EXPECT_EQ(fp_policy_init(FP_SKETCH, nullptr, 100), FP_INVALID_ARGUMENT);
  EXPECT_EQ(fp_policy_init(FP_SKETCH, &c.policy, 8), FP_INVALID_ARGUMENT);
  EXPECT_EQ(fp_policy_init(99, &c.policy, sizeof c.policy), FP_INVALID_ARGUMENT);
  EXPECT_EQ(fp_backend_name(-1), nullptr);
  EXPECT_EQ(fp_backend_available("quantum"), 0);
  EXPECT_EQ(fp_backend_describe(nullptr, nullptr, 0), 0u);
}

} // namespace
