// A test case of the three verbs, described by what matters (lengths, heads, dtypes, layout, strides, kind of data),
// and the memory that it stands for. Values are generated in logical order (sequence, token, head, dim), so that two
// cases that differ only in layout, strides or the order of pages hold the same numbers. Memory that no sequence owns
// (slots past the end, gaps between rows, unused pages) is NaN.
#ifndef FLASHPREFILL_TESTS_OP_CASE_H_
#define FLASHPREFILL_TESTS_OP_CASE_H_

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "core/half.h"
#include "core/types.h"
#include "tensor_memory.h"

namespace flashprefill::test {

struct Lengths {
  int64_t q, k; // causal cases need k >= q
};

enum class Layout { kRectangular, kPacked, kPaged };

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
  int scales = 2; // of FP8 k and v: 0: none, 1: one for all, 2: one per KV head, 3: one per sequence and KV head
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
  std::vector<float> scales_; // of k, then of v
};

} // namespace flashprefill::test

#endif // FLASHPREFILL_TESTS_OP_CASE_H_
