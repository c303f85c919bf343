// Builds the memory that a case describes: see op_case.h.
#include "op_case.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <sstream>
#include <stdexcept>

namespace flashprefill::test {
namespace {

const char* kStridesNames[] = {"contiguous", "head-major", "padded", "spread-dim", "dim-major", "reversed", "far"};
const char* kLayoutNames[] = {"rectangular", "packed", "paged"};
const char* kDtypeNames[] = {"f32", "bf16", "f16", "e4m3"};

template <typename T>
int64_t Max(const std::vector<T>& all, int64_t T::*field) {
  int64_t most = 0;
  for (const T& one : all) most = std::max(most, one.*field);
  return most;
}

} // namespace

std::string OpCase::Describe() const {
  std::ostringstream text;
  text << "lengths";
  for (const Lengths& l : lengths) text << " " << l.q << "/" << l.k;
  text << ", heads " << kv_heads * group << "/" << kv_heads << " x " << head_dim << ", " << kDtypeNames[q_dtype] << "/"
       << kDtypeNames[k_dtype] << "/" << kDtypeNames[v_dtype] << ", q " << kLayoutNames[int(q_layout)] << " "
       << kStridesNames[int(q_strides)] << ", k " << kLayoutNames[int(k_layout)] << " " << kStridesNames[int(k_strides)]
       << ", v " << kStridesNames[int(v_strides)] << ", out " << kStridesNames[int(out_strides)];
  if (k_layout == Layout::kPaged) text << ", pages of " << page_size;
  if (seqused_k) text << ", seqused_k";
  if (k_dtype == FP_E4M3 || v_dtype == FP_E4M3) text << ", scales " << scales;
  if (!causal) text << ", not causal";
  if (!final_chunk) text << ", not final";
  text << (values == Values::kRandom ? ", random" : ", structured") << ", seed " << seed;
  return text.str();
}

OpData::OpData(const OpCase& op) : op_(op) {
  Describe();
  Allocate();
  Fill();
}

// Everything but the tensors: lengths and index arrays.
void OpData::Describe() {
  fp_problem& p = problem_;
  fp_problem_init(&p);
  p.batch = static_cast<int32_t>(op_.lengths.size());
  p.q_heads = op_.kv_heads * op_.group;
  p.kv_heads = op_.kv_heads;
  p.head_dim = op_.head_dim;
  p.causal = op_.causal;
  p.final_chunk = op_.final_chunk;
  p.softmax_scale = op_.softmax_scale > 0 ? op_.softmax_scale : 1.0f / std::sqrt(static_cast<float>(op_.head_dim));
  p.max_seqlen_q = Max(op_.lengths, &Lengths::q);
  p.max_seqlen_k = Max(op_.lengths, &Lengths::k);

  if (op_.q_layout == Layout::kPacked) {
    cu_q_ = {0};
    for (const Lengths& l : op_.lengths) cu_q_.push_back(cu_q_.back() + static_cast<int32_t>(l.q));
    p.cu_seqlens_q = cu_q_.data();
    p.total_q = cu_q_.back();
    p.max_seqlen_q += 3; // an upper bound will do
  } else {
    for (const Lengths& l : op_.lengths) {
      if (l.q != p.max_seqlen_q) throw std::logic_error("rectangular q with unequal lengths");
    }
    p.total_q = p.batch * p.max_seqlen_q;
  }

  const int32_t room = op_.seqused_k ? 5 : 0; // keys that are there and not used
  if (op_.k_layout == Layout::kRectangular && !op_.seqused_k) {
    for (const Lengths& l : op_.lengths) {
      if (l.k != p.max_seqlen_k) throw std::logic_error("rectangular k with unequal lengths and no seqused_k");
    }
  }
  p.max_seqlen_k += room;
  if (op_.k_layout == Layout::kPacked || (op_.k_layout == Layout::kPaged && !op_.seqused_k)) {
    cu_k_ = {0};
    for (const Lengths& l : op_.lengths) cu_k_.push_back(cu_k_.back() + static_cast<int32_t>(l.k) + room);
    p.cu_seqlens_k = cu_k_.data();
    p.total_k = op_.k_layout == Layout::kPacked ? cu_k_.back() + 2 : 0;
  }
  if (op_.seqused_k) {
    for (const Lengths& l : op_.lengths) used_.push_back(static_cast<int32_t>(l.k));
    p.seqused_k = used_.data();
  }
  if (op_.k_layout == Layout::kPaged) {
    p.page_size = op_.page_size;
    p.pages_per_seq = static_cast<int32_t>(DivUp<int64_t>(p.max_seqlen_k, op_.page_size)) + 1;
    p.block_table_stride = p.pages_per_seq + 2;
    int64_t pages = 2; // unused
    for (const Lengths& l : op_.lengths) pages += DivUp<int64_t>(l.k, op_.page_size);
    p.page_count = pages;
    std::vector<int32_t> order(static_cast<size_t>(pages));
    std::iota(order.begin(), order.end(), 0);
    std::mt19937_64 random(op_.page_seed);
    std::shuffle(order.begin(), order.end(), random);
    table_.assign(static_cast<size_t>(std::max<int64_t>(p.batch * p.block_table_stride, 1)), -7); // not to be read
    size_t next = 0;
    for (int b = 0; b < p.batch; ++b) {
      for (int64_t page = 0; page < DivUp<int64_t>(op_.lengths[b].k, op_.page_size); ++page) {
        table_[b * p.block_table_stride + page] = order[next++];
      }
    }
    p.block_table = table_.data();
  }
}

void OpData::Allocate() {
  fp_problem& p = problem_;
  const bool packed_q = op_.q_layout == Layout::kPacked;
  q_ = TensorMemory(op_.q_dtype, {packed_q ? 0 : p.batch, packed_q ? p.total_q : p.max_seqlen_q, p.q_heads, p.head_dim},
                    op_.q_strides);
  int64_t k_extent[4] = {p.batch, p.max_seqlen_k, p.kv_heads, p.head_dim};
  if (op_.k_layout == Layout::kPacked) k_extent[0] = 0, k_extent[1] = p.total_k;
  if (op_.k_layout == Layout::kPaged) k_extent[0] = p.page_count, k_extent[1] = p.page_size;
  k_ = TensorMemory(op_.k_dtype, k_extent, op_.k_strides);
  v_ = TensorMemory(op_.v_dtype, k_extent, op_.v_strides);
  p.q = q_.tensor;
  p.k = k_.tensor;
  p.v = v_.tensor;

  const int64_t count = p.batch * p.kv_heads;
  for (int64_t i = 0; i < 2 * count; ++i) scales_.push_back(0.5f + 0.13f * static_cast<float>(i % 7));
  const int64_t by_head = op_.scales >= 2, by_sequence = op_.scales == 3 ? p.kv_heads : 0;
  const auto describe = [&](int32_t dtype, const float* from, const float*& scale, int64_t(&stride)[2]) {
    if (dtype != FP_E4M3 || op_.scales == 0) return;
    scale = from;
    stride[0] = by_sequence, stride[1] = by_head;
  };
  describe(op_.k_dtype, scales_.data(), p.k_scale, p.k_scale_stride);
  describe(op_.v_dtype, scales_.data() + count, p.v_scale, p.v_scale_stride);
}

void OpData::Fill() {
  const fp_problem& p = problem_;
  std::mt19937_64 random(op_.seed);
  std::normal_distribution<float> normal;
  const bool structured = op_.values == Values::kStructured;
  constexpr int kTopics = 4;
  // Strength of a topic in q and in k, so that a query and a key of one topic have softmax_scale * q.k near 6.
  const float strength = structured ? std::sqrt(6.0f / p.softmax_scale) : 0.0f;
  for (int b = 0; b < p.batch; ++b) {
    const Sequence s = sequence(b);
    std::vector<float> topics(static_cast<size_t>(p.kv_heads * kTopics * p.head_dim));
    for (int t = 0; structured && t < p.kv_heads * kTopics; ++t) {
      float* topic = topics.data() + t * p.head_dim;
      float square = 0;
      for (int d = 0; d < p.head_dim; ++d) topic[d] = normal(random), square += topic[d] * topic[d];
      for (int d = 0; d < p.head_dim; ++d) topic[d] *= strength / std::sqrt(square);
    }
    // Runs of 37 tokens share a topic; a few keys in a hundred stick out with twice the norm.
    const auto topic_of = [&](int64_t kv_head, int64_t position) {
      const uint64_t mixed = (static_cast<uint64_t>(position / 37) * 0x9e3779b97f4a7c15u) >> 60;
      return topics.data() + (kv_head * kTopics + static_cast<int64_t>(mixed % kTopics)) * p.head_dim;
    };
    for (int64_t i = 0; i < s.q_len; ++i) {
      for (int h = 0; h < p.q_heads; ++h) {
        const float* topic = topic_of(h / op_.group, i + 11 * h);
        for (int d = 0; d < p.head_dim; ++d) SetQuery(s, i, h, d, normal(random) + topic[d]);
      }
    }
    for (int64_t t = 0; t < s.k_len; ++t) {
      for (int h = 0; h < p.kv_heads; ++h) {
        const float* topic = topic_of(h, t);
        const float length = structured && random() % 32 == 0 ? 2.0f : 1.0f;
        for (int d = 0; d < p.head_dim; ++d) {
          SetKey(p.k, s, t, h, d, length * (normal(random) + topic[d]));
          SetKey(p.v, s, t, h, d, normal(random));
        }
      }
    }
  }
}

float OpData::Query(const Sequence& s, int64_t i, int64_t h, int64_t d) const {
  return LoadElement(problem_.q.data, problem_.q.dtype,
                     RowOffset(problem_, problem_.q.stride, s, i, h) + d * problem_.q.stride[3]);
}

float OpData::Key(const fp_tensor& x, const Sequence& s, int64_t t, int64_t h, int64_t d) const {
  return LoadElement(x.data, x.dtype, KeyOffset(problem_, x.stride, s, t, h) + d * x.stride[3]);
}

void OpData::SetQuery(const Sequence& s, int64_t i, int64_t h, int64_t d, float value) {
  StoreElement(problem_.q.data, problem_.q.dtype,
               RowOffset(problem_, problem_.q.stride, s, i, h) + d * problem_.q.stride[3], value);
}

void OpData::SetKey(const fp_tensor& x, const Sequence& s, int64_t t, int64_t h, int64_t d, float value) {
  StoreElement(x.data, x.dtype, KeyOffset(problem_, x.stride, s, t, h) + d * x.stride[3], value);
}

} // namespace flashprefill::test
