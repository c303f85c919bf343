// flashprefill: sparse attention for the prefill of long prompts. The C++ API: three verbs over the C ABI, header only.
//
//     fp::Problem problem = fp::Problem::Rectangular(fp::Shape{...}, FP_BF16, q, k, v);
//     fp::FlashPrefill policy;              // or FlexPrefill, MInference, Sketch, ...
//     policy.alpha = 0.18f;
//     fp::BlockMask mask = fp::select(problem, policy);
//     fp::attend(problem, mask, fp::Output(problem, out));
//     fp::prefill(problem, policy, fp::Output(problem, out));      // both at once
//
// with `namespace fp = flashprefill`. Errors are thrown as flashprefill::Error, whose one line names the argument, its
// value and what it must be; nothing has been written then. Masks and scratch memory of these functions are host
// memory: CUDA users bring their own and call the C ABI.
#ifndef FLASHPREFILL_FLASHPREFILL_HPP_
#define FLASHPREFILL_FLASHPREFILL_HPP_

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "flashprefill/flashprefill.h"

namespace flashprefill {

// A refused argument, a missing feature, or a device that failed: see status().
class Error : public std::runtime_error {
 public:
  Error(fp_status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  fp_status status() const { return status_; }

 private:
  fp_status status_;
};

inline void Check(fp_status status) {
  if (status != FP_OK) throw Error(status, fp_last_error());
}

// ---------------------------------------------------------------- policies
// Each is its C struct with the published defaults; the fields of `common` (block_size, sink_blocks, window_blocks,
// dense_tail_blocks, share_heads, mean_correction) are there for all of them.

struct Dense : fp_dense {
  Dense() { Check(fp_policy_init(FP_DENSE, this, sizeof(fp_dense))); }
};

struct Streaming : fp_streaming {
  Streaming() { Check(fp_policy_init(FP_STREAMING, this, sizeof(fp_streaming))); }
};

// FlashPrefill, arXiv 2603.06199. query_pool = 1 is the paper; 16 scores means of 16 query rows.
struct FlashPrefill : fp_flashprefill {
  FlashPrefill() { Check(fp_policy_init(FP_FLASHPREFILL, this, sizeof(fp_flashprefill))); }
  explicit FlashPrefill(float keep_from) : FlashPrefill() { alpha = keep_from; }
};

// Decided by mass (the default, 0.95) or, after KeepFrom, by alpha, or after KeepGain, by gain.
struct Sketch : fp_sketch {
  Sketch() { Check(fp_policy_init(FP_SKETCH, this, sizeof(fp_sketch))); }
  Sketch& KeepMass(float share) {
    mass = share;
    alpha = gain = std::numeric_limits<float>::quiet_NaN();
    return *this;
  }
  Sketch& KeepFrom(float share_of_largest) {
    alpha = share_of_largest;
    mass = gain = std::numeric_limits<float>::quiet_NaN();
    return *this;
  }
  Sketch& KeepGain(float least) {
    gain = least;
    alpha = mass = std::numeric_limits<float>::quiet_NaN();
    return *this;
  }
};

// FlexPrefill, arXiv 2502.20766. Budgets count tokens.
struct FlexPrefill : fp_flexprefill {
  FlexPrefill() { Check(fp_policy_init(FP_FLEXPREFILL, this, sizeof(fp_flexprefill))); }
};

// MInference, arXiv 2407.02490: vertical and slash of all heads, or a pattern for each.
struct MInference : fp_minference {
  MInference() { Check(fp_policy_init(FP_MINFERENCE, this, sizeof(fp_minference))); }
  // The list is read during calls, and stays the caller's.
  MInference& SetHeads(const std::vector<fp_minference_head>& list) {
    heads = list.data();
    head_count = static_cast<int32_t>(list.size());
    return *this;
  }
};

// XAttention, arXiv 2503.16428: one threshold, or one for each query head.
struct XAttention : fp_xattention {
  XAttention() { Check(fp_policy_init(FP_XATTENTION, this, sizeof(fp_xattention))); }
  // The list is read during calls, and stays the caller's.
  XAttention& SetHeadThresholds(const std::vector<float>& list) {
    head_thresholds = list.data();
    head_count = static_cast<int32_t>(list.size());
    return *this;
  }
};

// RRAttention, arXiv 2602.05853.
struct RRAttention : fp_rrattention {
  RRAttention() { Check(fp_policy_init(FP_RRATTENTION, this, sizeof(fp_rrattention))); }
};

// SpargeAttn, arXiv 2502.18137; its second stage is skip. Decided by cdf (the default, 0.98) or, after TopK, by topk.
struct SpargeAttn : fp_sparge_attn {
  SpargeAttn() { Check(fp_policy_init(FP_SPARGE_ATTN, this, sizeof(fp_sparge_attn))); }
  SpargeAttn& TopK(float share_of_blocks) {
    topk = share_of_blocks;
    cdf = std::numeric_limits<float>::quiet_NaN();
    return *this;
  }
};

// Prism, arXiv 2602.08426.
struct Prism : fp_prism {
  Prism() { Check(fp_policy_init(FP_PRISM, this, sizeof(fp_prism))); }
};

// SampleAttention, arXiv 2406.15486.
struct SampleAttention : fp_sample_attention {
  SampleAttention() { Check(fp_policy_init(FP_SAMPLE_ATTENTION, this, sizeof(fp_sample_attention))); }
};

// VSPrefill, arXiv 2603.04460. Its weights are the caller's: fill in their shape and addresses.
struct VSPrefill : fp_vsprefill {
  VSPrefill() { Check(fp_policy_init(FP_VSPREFILL, this, sizeof(fp_vsprefill))); }
};

// Gather: single keys in place of blocks. Decided by gain (the default) or, after Budget, by a share of the keys.
struct Gather : fp_gather {
  Gather() { Check(fp_policy_init(FP_GATHER, this, sizeof(fp_gather))); }
  Gather& Budget(float share_of_keys) {
    budget = share_of_keys;
    gain = std::numeric_limits<float>::quiet_NaN();
    return *this;
  }
};

// S2O, arXiv 2602.22575.
struct S2O : fp_s2o {
  S2O() { Check(fp_policy_init(FP_S2O, this, sizeof(fp_s2o))); }
};

// ---------------------------------------------------------------- problem

struct Shape {
  int32_t batch = 1;
  int64_t q_len = 0; // query tokens of each sequence
  int64_t k_len = 0; // keys of each sequence, its cached prefix included: at least q_len
  int32_t q_heads = 1;
  int32_t kv_heads = 1;
  int32_t head_dim = 64;
};

// A contiguous [sequence, tokens, heads, head_dim] tensor.
inline fp_tensor Contiguous(const void* data, fp_dtype dtype, int64_t tokens, int64_t heads, int64_t head_dim) {
  fp_tensor t{};
  t.data = const_cast<void*>(data);
  t.dtype = dtype;
  t.stride[0] = tokens * heads * head_dim;
  t.stride[1] = heads * head_dim;
  t.stride[2] = head_dim;
  t.stride[3] = 1;
  return t;
}

// The C struct with its defaults. Change any field after making it: causal, softmax_scale, strides, final_chunk, ...
struct Problem : fp_problem {
  Problem() { fp_problem_init(this); }

  // Contiguous q [batch, q_len, q_heads, head_dim] and k, v [batch, k_len, kv_heads, head_dim].
  static Problem Rectangular(const Shape& shape, fp_dtype dtype, const void* q, const void* k, const void* v) {
    Problem p = Common(shape, dtype, q, k, v);
    p.total_q = shape.batch * shape.q_len;
    p.total_k = shape.batch * shape.k_len;
    return p;
  }

  // Contiguous packed q [total_q, q_heads, head_dim] and k, v [total_k, kv_heads, head_dim]; the cumulative lengths
  // have batch + 1 entries. shape.q_len and shape.k_len are the longest sequence's.
  static Problem Packed(const Shape& shape, fp_dtype dtype, const void* q, const void* k, const void* v,
                        const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k) {
    Problem p = Common(shape, dtype, q, k, v);
    p.cu_seqlens_q = cu_seqlens_q;
    p.cu_seqlens_k = cu_seqlens_k;
    p.total_q = cu_seqlens_q[shape.batch];
    p.total_k = cu_seqlens_k[shape.batch];
    return p;
  }

 private:
  static Problem Common(const Shape& shape, fp_dtype dtype, const void* q, const void* k, const void* v) {
    Problem p;
    p.batch = shape.batch;
    p.q_heads = shape.q_heads;
    p.kv_heads = shape.kv_heads;
    p.head_dim = shape.head_dim;
    p.max_seqlen_q = shape.q_len;
    p.max_seqlen_k = shape.k_len;
    p.softmax_scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
    p.q = Contiguous(q, dtype, shape.q_len, shape.q_heads, shape.head_dim);
    p.k = Contiguous(k, dtype, shape.k_len, shape.kv_heads, shape.head_dim);
    p.v = Contiguous(v, dtype, shape.k_len, shape.kv_heads, shape.head_dim);
    return p;
  }
};

// Where results go: contiguous out [.., q_heads, head_dim] in q's layout and dtype; lse fp32 [batch, q_heads, q_len],
// or [q_heads, total_q] for packed problems, or null.
struct Output : fp_output {
  Output(const Problem& p, void* out_data, float* lse_data = nullptr) {
    fp_output_init(this);
    out = Contiguous(out_data, static_cast<fp_dtype>(p.q.dtype), p.max_seqlen_q, p.q_heads, p.head_dim);
    lse = lse_data;
    const int64_t tokens = p.cu_seqlens_q ? p.total_q : p.max_seqlen_q;
    lse_stride[0] = p.q_heads * tokens;
    lse_stride[1] = tokens;
    lse_stride[2] = 1;
  }
};

struct Exec : fp_exec {
  Exec() { fp_exec_init(this); }
};

// ---------------------------------------------------------------- mask and statistics

// Kept and visible blocks by sequence and mask head, and why a sequence was not selected for.
struct Stats {
  int32_t batch = 0, heads = 0;
  std::vector<int64_t> kept;       // [batch, heads]
  std::vector<int64_t> total;      // [batch]: of one head
  std::vector<int32_t> fallback;   // [batch]: fp_fallback
  std::vector<int64_t> overflowed; // [batch, heads]: key lists that were full
  std::vector<int64_t> skipped;    // [batch, heads]: kept blocks that attend skipped

  // Kept / visible over everything; 1 where nothing is visible.
  double density() const {
    double kept_sum = 0, total_sum = 0;
    for (int64_t n : kept) kept_sum += static_cast<double>(n);
    for (int64_t n : total) total_sum += static_cast<double>(n) * heads;
    return total_sum > 0 ? kept_sum / total_sum : 1.0;
  }
};

// One bit for each (mask head, query tile, key block), with its memory. See fp_block_mask for the layout.
class BlockMask {
 public:
  // The mask that `policy` makes for `problem`, still empty.
  template <typename P>
  static BlockMask For(const Problem& problem, const P& policy) {
    BlockMask mask;
    fp_block_mask_init(&mask.view_);
    Check(fp_mask_describe(&problem, &policy.common, &mask.view_));
    mask.bits_.resize(static_cast<size_t>(mask.view_.heads * mask.view_.tile_rows * mask.view_.words));
    mask.counts_.resize(static_cast<size_t>(mask.view_.heads * mask.view_.tile_rows));
    mask.skipped_.resize(mask.counts_.size());
    mask.fallback_.resize(static_cast<size_t>(problem.batch));
    const int64_t room = int64_t{mask.view_.max_verticals} + mask.view_.max_slashes;
    if (room > 0) mask.vertical_slash_.resize(static_cast<size_t>(problem.batch * mask.view_.heads * (2 + room)));
    const int64_t list = mask.view_.max_keys > 0 ? 2 + int64_t{mask.view_.max_keys} : 0;
    mask.key_lists_.resize(static_cast<size_t>(mask.view_.heads * mask.view_.segment_rows * list));
    return mask;
  }

  // The C view; valid while the mask lives and stays where it is.
  fp_block_mask* view() {
    view_.bits = bits_.data();
    view_.counts = counts_.data();
    view_.fallback = fallback_.data();
    view_.vertical_slash = vertical_slash_.data();
    view_.key_lists = key_lists_.data();
    view_.skipped = skipped_.data();
    return &view_;
  }
  const fp_block_mask* view() const { return const_cast<BlockMask*>(this)->view(); }

  // The bit of (mask head, tile of sequence 0, block).
  bool test(int64_t head, int64_t tile, int64_t block) const {
    return (bits_[static_cast<size_t>(Word(head, tile, block))] >> (block % 64)) & 1;
  }
  void set(int64_t head, int64_t tile, int64_t block, bool keep) {
    uint64_t& word = bits_[static_cast<size_t>(Word(head, tile, block))];
    const uint64_t bit = uint64_t{1} << (block % 64);
    word = keep ? word | bit : word & ~bit;
  }

  Stats stats(const Problem& problem) const {
    Stats s;
    s.batch = problem.batch;
    s.heads = view_.heads;
    s.kept.resize(static_cast<size_t>(s.batch) * static_cast<size_t>(s.heads));
    s.total.resize(static_cast<size_t>(s.batch));
    s.fallback.resize(static_cast<size_t>(s.batch));
    s.overflowed.resize(s.kept.size());
    s.skipped.resize(s.kept.size());
    fp_stats c;
    fp_stats_init(&c);
    c.kept = s.kept.data();
    c.total = s.total.data();
    c.fallback = s.fallback.data();
    c.overflowed = s.overflowed.data();
    c.skipped = s.skipped.data();
    Check(fp_mask_stats(&problem, view(), &c));
    return s;
  }

 private:
  int64_t Word(int64_t head, int64_t tile, int64_t block) const {
    return (head * view_.tile_rows + tile) * view_.words + block / 64;
  }

  fp_block_mask view_{};
  std::vector<uint64_t> bits_;
  std::vector<int32_t> counts_;
  std::vector<int32_t> fallback_;
  std::vector<int32_t> vertical_slash_;
  std::vector<int32_t> key_lists_;
  std::vector<int32_t> skipped_;
};

// Scratch memory of one call, aligned as the library wants it.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : bytes_(bytes), data_(bytes ? Allocate(bytes) : nullptr, &std::free) {}
  void* data() const { return data_.get(); }
  size_t size() const { return bytes_; }

 private:
  static void* Allocate(size_t bytes) {
    void* data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!data) throw std::bad_alloc();
    return data;
  }
  size_t bytes_;
  std::unique_ptr<void, decltype(&std::free)> data_;
};

// A guard with memory for its results: exec.guard = &guard of prefill, or the argument of audit. Arrays are
// [batch, q_heads]; `levels`, [q_heads], are kept from call to call.
class Guard {
 public:
  explicit Guard(const Problem& p, fp_guard_mode mode = FP_GUARD_OBSERVE) {
    const size_t heads = static_cast<size_t>(p.batch) * static_cast<size_t>(p.q_heads);
    for (std::vector<float>* values : {&recall, &recall_low, &recall_p05}) values->resize(heads);
    for (std::vector<int32_t>* values : {&rows_audited, &missed_block, &outcome}) values->resize(heads);
    certificate.resize(static_cast<size_t>(p.batch));
    levels.resize(static_cast<size_t>(p.q_heads));
    fp_guard_init(&settings);
    settings.mode = mode;
  }

  // The C view; valid while the guard lives and stays where it is.
  fp_guard* view() {
    settings.levels = levels.data();
    settings.recall = recall.data();
    settings.recall_low = recall_low.data();
    settings.recall_p05 = recall_p05.data();
    settings.rows_audited = rows_audited.data();
    settings.missed_block = missed_block.data();
    settings.outcome = outcome.data();
    settings.certificate = certificate.data();
    return &settings;
  }

  fp_guard settings; // mode, target, rows, layer, seed, risk: change any of them
  std::vector<float> recall, recall_low, recall_p05, certificate, levels;
  std::vector<int32_t> rows_audited, missed_block, outcome;
};

// ---------------------------------------------------------------- the three verbs

// Find the blocks that matter.
template <typename P>
BlockMask select(const Problem& problem, const P& policy, const Exec& exec = {}) {
  BlockMask mask = BlockMask::For(problem, policy);
  size_t bytes = 0;
  Check(fp_select_workspace(&problem, &policy.common, &exec, &bytes));
  const Workspace workspace(bytes);
  Check(fp_select(&problem, &policy.common, &exec, mask.view(), workspace.data(), workspace.size()));
  return mask;
}

// Exact softmax attention over the kept blocks.
inline void attend(const Problem& problem, const BlockMask& mask, const Output& output, const Exec& exec = {}) {
  size_t bytes = 0;
  Check(fp_attend_workspace(&problem, mask.view(), &exec, &bytes));
  const Workspace workspace(bytes);
  Check(fp_attend(&problem, mask.view(), &exec, &output, workspace.data(), workspace.size()));
}

// Both. Pass a mask (made by BlockMask::For) to keep what was selected, and exec.guard = guard.view() to guard it.
template <typename P>
void prefill(const Problem& problem, const P& policy, const Output& output, const Exec& exec = {},
             BlockMask* mask = nullptr) {
  size_t bytes = 0;
  Check(fp_prefill_workspace(&problem, &policy.common, &exec, &bytes));
  const Workspace workspace(bytes);
  Check(fp_prefill(&problem, &policy.common, &exec, mask ? mask->view() : nullptr, &output, workspace.data(),
                   workspace.size()));
}

// Measure what a mask keeps. Modes other than FP_GUARD_OBSERVE write to it.
inline void audit(const Problem& problem, BlockMask& mask, Guard& guard, Exec exec = {}) {
  exec.guard = guard.view();
  size_t bytes = 0;
  Check(fp_audit_workspace(&problem, mask.view(), &exec, &bytes));
  const Workspace workspace(bytes);
  Check(fp_audit(&problem, mask.view(), &exec, workspace.data(), workspace.size()));
}

} // namespace flashprefill

#endif // FLASHPREFILL_FLASHPREFILL_HPP_
