// A test case of the three verbs, described by what matters (lengths, heads, dtypes, layout, strides, kind of data),
// and the memory that it stands for. Values are generated in logical order (sequence, token, head, dim), so that two
// cases that differ only in layout, strides or the order of pages hold the same numbers. Whatever no sequence owns
// (slots past the end, gaps between rows, pages of nobody) is NaN: a kernel that reads it into a product shows.
#ifndef FLASHPREFILL_TESTS_OP_CASE_H_
#define FLASHPREFILL_TESTS_OP_CASE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/half.h"
#include "core/types.h"

namespace flashprefill::test {

// --small was given: run a part of the cases.
bool Small();
void SetSmall(bool small);

// All of the cases, or with --small each `step`-th of them.
template <typename T>
std::vector<T> Thinned(const std::vector<T>& all, size_t step = 4) {
  if (!Small()) return all;
  std::vector<T> some;
  for (size_t i = 0; i < all.size(); i += step) some.push_back(all[i]);
  return some;
}

// ---------------------------------------------------------------- policies

// Any of the policies, by value.
struct AnyPolicy {
  union {
    fp_policy common;
    fp_dense dense;
    fp_streaming streaming;
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
  explicit AnyPolicy(int32_t kind); // with its published defaults
  const fp_policy* get() const { return &common; }
};

AnyPolicy Dense(int block_size = 128);
AnyPolicy Streaming(int block_size, int sink, int window, int tail);
// Without forced blocks beyond the diagonal, so that the score decides.
AnyPolicy FlashPrefill(int block_size, float alpha, int query_pool = 1);
AnyPolicy SketchByMass(int block_size, float mass, int outliers = 4, int query_pool = 16);
AnyPolicy SketchByAlpha(int block_size, float alpha, int outliers = 4, int query_pool = 16);
AnyPolicy SketchByGain(int block_size, float gain, int outliers = 4, int query_pool = 16);
AnyPolicy ByQueries(AnyPolicy sketch); // with query_metric
AnyPolicy FlexPrefill(int block_size, float gamma, float tau, int min_budget = 16, int max_budget = 0);
AnyPolicy MInference(int block_size, int vertical, int slash);
// One pattern for each query head; the list has to outlive the policy.
AnyPolicy MInference(int block_size, const std::vector<fp_minference_head>& heads);
// These keep what they force by default, unless WithForced says otherwise. `norm` below 1 makes scores peaked.
AnyPolicy XAttention(int block_size, float threshold, int stride = 16, float norm = 1);
AnyPolicy RRAttention(int block_size, float threshold, int stride = 8);
AnyPolicy SpargeByCdf(int block_size, float cdf, float similarity);
AnyPolicy SpargeByTopk(int block_size, float topk, float similarity);
AnyPolicy Prism(int block_size, float mass, int rotary_dim = 0, bool interleaved = false);
AnyPolicy SampleAttention(int block_size, float coverage, float sample_ratio, float window_ratio, int sample_rows);
AnyPolicy InTokens(AnyPolicy minference); // lines in place of the blocks that hold them
AnyPolicy WithForced(AnyPolicy policy, int sink, int window, int tail);
AnyPolicy Shared(AnyPolicy policy);
AnyPolicy Corrected(AnyPolicy policy);
std::string Name(const AnyPolicy& policy);

// ---------------------------------------------------------------- cases

struct Lengths {
  int64_t q, k; // causal cases need k >= q
};

enum class Layout { kRectangular, kPacked, kPaged };

enum class Strides {
  kContiguous, // [sequence or page, token, head, dim]
  kHeadMajor,  // [sequence or page, head, token, dim], as Transformers has it
  kPadded,     // gaps between rows, heads and sequences, and a start that is not aligned
  kSpreadDim,  // head_dim stride 3
  kDimMajor,   // [sequence or page, head, dim, token]: K transposed inside a page
  kReversed,   // tokens and heads run backwards
  kFar         // sequences, pages or heads lie 2^30 elements or more apart, in memory that is mostly not there
};

enum class Values {
  kRandom,    // independent, unit variance
  kStructured // keys and queries share a few directions and some keys stick out: energies are peaked
};

struct OpCase {
  std::vector<Lengths> lengths = {{128, 128}};
  int kv_heads = 1;
  int group = 1;
  int head_dim = 64;
  int32_t q_dtype = FP_F32;
  int32_t k_dtype = FP_F32;
  int32_t v_dtype = FP_F32;
  Layout q_layout = Layout::kRectangular; // rectangular or packed
  Layout k_layout = Layout::kRectangular;
  Strides q_strides = Strides::kContiguous;
  Strides k_strides = Strides::kContiguous;
  Strides v_strides = Strides::kContiguous;
  Strides out_strides = Strides::kContiguous;
  int page_size = 16;
  bool seqused_k = false; // give seqused_k, with room for more keys than are used
  bool causal = true;
  bool final_chunk = true;
  float softmax_scale = 0; // 0: head_dim^-1/2
  Values values = Values::kRandom;
  uint64_t seed = 1;
  uint64_t page_seed = 1;

  OpCase& Dtypes(int32_t q, int32_t k, int32_t v) {
    q_dtype = q, k_dtype = k, v_dtype = v;
    return *this;
  }
  OpCase& AllDtypes(int32_t dtype) { return Dtypes(dtype, dtype, dtype); }
  OpCase& AllStrides(Strides strides) {
    q_strides = k_strides = v_strides = out_strides = strides;
    return *this;
  }
  std::string Describe() const;
};

// ---------------------------------------------------------------- memory

// Zeroed or NaN-filled memory of a tensor; far tensors are mapped without being reserved.
class Memory {
 public:
  Memory() = default;
  Memory(size_t bytes, bool sparse);
  ~Memory();
  Memory(Memory&& other) noexcept { *this = std::move(other); }
  Memory& operator=(Memory&& other) noexcept;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool sparse() const { return sparse_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  bool sparse_ = false;
};

// A tensor and the memory under it, all NaN (sparse memory: zero).
struct TensorMemory {
  Memory memory;
  fp_tensor tensor{};

  TensorMemory() = default;
  // extent: sequences or pages, tokens, heads, dims. A first extent of 0 stands for "packed": its stride is not read.
  TensorMemory(int32_t dtype, const int64_t (&extent)[4], Strides strides);
};

// A case in memory.
class OpData {
 public:
  explicit OpData(const OpCase& op);

  const OpCase& op() const { return op_; }
  const fp_problem& problem() const { return problem_; }
  Sequence sequence(int b) const { return SequenceOf(problem_, b); }

  // One element of q (token i, query head h), or of k or v (token t, KV head h).
  float Query(const Sequence& s, int64_t i, int64_t h, int64_t d) const;
  float Key(const fp_tensor& k_or_v, const Sequence& s, int64_t t, int64_t h, int64_t d) const;
  void SetQuery(const Sequence& s, int64_t i, int64_t h, int64_t d, float value);
  void SetKey(const fp_tensor& k_or_v, const Sequence& s, int64_t t, int64_t h, int64_t d, float value);

 private:
  void Describe();
  void Allocate();
  void Fill();

  OpCase op_;
  fp_problem problem_{};
  TensorMemory q_, k_, v_;
  std::vector<int32_t> cu_q_, cu_k_, used_, table_;
};

} // namespace flashprefill::test

#endif // FLASHPREFILL_TESTS_OP_CASE_H_
