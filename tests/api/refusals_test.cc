// Bad input over the C ABI: each kind is refused with one line that names the argument, its value and what it must be,
// before anything is written. Fields of policies are in policy_refusals_test.cc.
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "call.h"

namespace flashprefill::test {
namespace {

struct Refusal {
  const char* name;
  std::function<void(Call&)> breaks;
  std::vector<const char*> says; // all of these stand in the message
  fp_status status = FP_INVALID_ARGUMENT;
};

void PrintTo(const Refusal& r, std::ostream* os) { *os << r.name; }

const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInf = std::numeric_limits<float>::infinity();
const float kScales[] = {1, 0}; // of two KV heads

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
      {"causal_off_with_policy",
       [](Call& c) { c.problem.causal = 0; },
       {"causal is 0", "1 for flashprefill", "dense, spargeattn, xattention"}},
      {"causal_off_with_window",
       [](Call& c) {
         c.problem.causal = 0;
         c.policy = Parse("xattention(window_blocks=2)");
       },
       {"window_blocks with causal=0 is 2", "from 0 to 1"}},
      {"causal_off_with_dense_tail",
       [](Call& c) {
         c.problem.causal = 0;
         c.policy = Parse("spargeattn(dense_tail_blocks=1)");
       },
       {"dense_tail_blocks with causal=0 is 1", "from 0 to 0"}},
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
      {"v_dtype", [](Call& c) { c.problem.v.dtype = 4; }, {"v.dtype is 4", "from 0 to 3"}},
      {"q_fp8", [](Call& c) { c.problem.q.dtype = FP_E4M3; }, {"q.dtype is FP_E4M3 (3)", "only k and v may be FP8"}},
      {"k_scale_dtype", [](Call& c) { c.problem.k_scale = &kScales[0]; }, {"k_scale", "NULL but where the dtype is"}},
      {"v_scale_value",
       [](Call& c) {
         c.problem.v.dtype = FP_E4M3;
         c.problem.v_scale = &kScales[0];
         c.problem.v_scale_stride[1] = 1;
       },
       {"v_scale[0][1] is 0", "finite and above 0"}},
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
      {"share_heads_group",
       [](Call& c) { c.policy.common.share_heads = 1, c.problem.q_heads = 2 * 129; },
       {"share_heads is 1", "128 query heads"}},
      {"mask_verticals_room",
       [](Call& c) {
         static int32_t lists[7];
         c.use_mask = true, c.mask.max_verticals = 5, c.mask.vertical_slash = lists;
       },
       {"mask.max_verticals is 5", "policy's (0)"}},
      {"mask_keys_room",
       [](Call& c) {
         static int32_t lists[64];
         c.use_mask = true, c.mask.max_keys = 5, c.mask.segment_tiles = 1000, c.mask.key_lists = lists;
         c.mask.segment_rows = c.problem.batch;
       },
       {"mask.max_keys is 5", "policy's (0)"}},
      {"mask_segment_tiles",
       [](Call& c) { c.use_mask = true, c.mask.max_keys = 5; },
       {"mask.segment_tiles is 0", "from 1"}},
      {"mask_segment_rows",
       [](Call& c) { c.use_mask = true, c.mask.max_keys = 5, c.mask.segment_tiles = 1, c.mask.segment_rows = 77; },
       {"mask.segment_rows is 77", "fp_mask_describe"}},
      {"mask_keys_and_lines",
       [](Call& c) {
         static int32_t lists[64];
         c.use_mask = true, c.mask.max_keys = c.mask.max_slashes = 5, c.mask.segment_tiles = 1000;
         c.mask.segment_rows = c.problem.batch, c.mask.vertical_slash = lists;
       },
       {"mask.max_keys is 5", "0 where the mask has verticals or slashes"}},
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
  };
  return all;
}

class RefusalTest : public testing::TestWithParam<Refusal> {};

TEST_P(RefusalTest, NamesTheArgumentAndWritesNothing) {
  Call call;
  GetParam().breaks(call);
  const std::string message = RefusalOf(call, GetParam().status);
  for (const char* words : GetParam().says) EXPECT_NE(message.find(words), std::string::npos) << message;
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
  paged.policy = Parse("sketch");
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
  EXPECT_EQ(fp_prefill_dense_keys(nullptr, FP_CPU, nullptr, nullptr), FP_INVALID_ARGUMENT);
  EXPECT_STREQ(fp_last_error(), "policy is NULL; it must be a policy");
  EXPECT_EQ(fp_prefill_dense_keys(&c.policy.common, FP_CPU, nullptr, nullptr), FP_INVALID_ARGUMENT);
  EXPECT_EQ(fp_backend_name(-1), nullptr);
  EXPECT_EQ(fp_backend_available("quantum"), 0);
  EXPECT_EQ(fp_backend_describe(nullptr, nullptr, 0), 0u);
}

// Only fp_prefill has a workspace that bits may lie in.
TEST(Refusals, AMaskWithoutBits) {
  Call c;
  c.mask.bits = nullptr;
  EXPECT_EQ(fp_select(&c.problem, &c.policy.common, &c.exec, &c.mask, c.workspace, c.workspace_bytes),
            FP_INVALID_ARGUMENT);
  EXPECT_NE(std::string(fp_last_error()).find("mask.bits is NULL"), std::string::npos);
  EXPECT_EQ(fp_attend(&c.problem, &c.mask, &c.exec, &c.output, c.workspace, c.workspace_bytes), FP_INVALID_ARGUMENT);
  EXPECT_NE(std::string(fp_last_error()).find("mask.bits is NULL"), std::string::npos);
  c.use_mask = true;
  EXPECT_EQ(c.Prefill(), FP_OK) << fp_last_error();
  c.mask.bits = c.bits.data();
  c.mask.max_slashes = 5;
  EXPECT_EQ(fp_attend(&c.problem, &c.mask, &c.exec, &c.output, c.workspace, c.workspace_bytes), FP_INVALID_ARGUMENT);
  EXPECT_NE(std::string(fp_last_error()).find("mask.vertical_slash is NULL"), std::string::npos);
}

} // namespace
} // namespace flashprefill::test
