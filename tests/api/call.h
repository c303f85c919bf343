// A call of fp_prefill that is right, for tests that break one thing of it, and the check that it was refused.
#ifndef FLASHPREFILL_TESTS_API_CALL_H_
#define FLASHPREFILL_TESTS_API_CALL_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "flashprefill/flashprefill.h"
#include "policy.h"

namespace flashprefill::test {

constexpr int kBatch = 2, kTokens = 40, kHeads = 4, kKvHeads = 2, kDim = 16, kPage = 16, kPages = 6;
constexpr float kCanary = 12345.0f;

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
    output.lse_stride[1] = kBatch * kTokens;
  }
  void MakePaged() { // 2 x 40 keys in pages of 16
    problem.block_table = table.data();
    problem.block_table_stride = problem.pages_per_seq = 3;
    problem.page_size = kPage;
    problem.page_count = kPages;
    problem.seqused_k = used.data();
    problem.k.stride[0] = problem.v.stride[0] = kPage * kKvHeads * kDim;
  }
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
  AnyPolicy policy = Parse("flashprefill");
  fp_output output;
  fp_exec exec;
  fp_block_mask mask;
  bool use_mask = false;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
};

// The call is refused with one line, and nothing is written. Returns the line.
inline std::string RefusalOf(Call& call, fp_status status = FP_INVALID_ARGUMENT) {
  EXPECT_EQ(call.Prefill(), status);
  std::string message = fp_last_error();
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  int64_t written = 0;
  for (const float x : call.out) written += x != kCanary;
  for (const float x : call.lse) written += x != kCanary;
  for (const uint64_t word : call.bits) written += word != 0;
  EXPECT_EQ(written, 0) << message;
  return message;
}

} // namespace flashprefill::test

#endif // FLASHPREFILL_TESTS_API_CALL_H_
