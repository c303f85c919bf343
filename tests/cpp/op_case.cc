// Builds the memory that a case describes: see op_case.h.
#include "op_case.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace flashprefill::test {
namespace {

bool small = false;

constexpr int64_t kFarStep = (int64_t{1} << 30) + 24;        // pages: the third lies beyond 2^31 elements
constexpr int64_t kVeryFarStep = (int64_t{1} << 31) + 24;    // sequences and heads: the second does
constexpr int64_t kUnreadStride = (int64_t{1} << 40) + 1234; // for strides that must not be read

const char* kStridesNames[] = {"contiguous", "head-major", "padded", "spread-dim", "dim-major", "reversed", "far"};
const char* kLayoutNames[] = {"rectangular", "packed", "paged"};
const char* kDtypeNames[] = {"f32", "bf16", "f16"};

template <typename T>
int64_t Max(const std::vector<T>& all, int64_t T::*field) {
  int64_t most = 0;
  for (const T& one : all) most = std::max(most, one.*field);
  return most;
}

} // namespace

bool Small() { return small; }
void SetSmall(bool value) { small = value; }

// ---------------------------------------------------------------- policies

AnyPolicy::AnyPolicy(int32_t kind) {
  if (fp_policy_init(kind, this, sizeof(*this)) != FP_OK) throw std::runtime_error(fp_last_error());
}

AnyPolicy Dense(int block_size) {
  AnyPolicy policy(FP_DENSE);
  policy.common.block_size = block_size;
  return policy;
}

AnyPolicy WithForced(AnyPolicy policy, int sink, int window, int tail) {
  policy.common.sink_blocks = sink;
  policy.common.window_blocks = window;
  policy.common.dense_tail_blocks = tail;
  return policy;
}

AnyPolicy Streaming(int block_size, int sink, int window, int tail) {
  AnyPolicy policy(FP_STREAMING);
  policy.common.block_size = block_size;
  return WithForced(policy, sink, window, tail);
}

AnyPolicy FlashPrefill(int block_size, float alpha, int query_pool) {
  AnyPolicy policy(FP_FLASHPREFILL);
  policy.common.block_size = block_size;
  policy.flashprefill.alpha = alpha;
  policy.flashprefill.query_pool = query_pool;
  return WithForced(policy, 0, 0, 0);
}

AnyPolicy SketchByMass(int block_size, float mass, int outliers, int query_pool) {
  AnyPolicy policy(FP_SKETCH);
  policy.common.block_size = block_size;
  policy.sketch.mass = mass;
  policy.sketch.outliers = outliers;
  policy.sketch.query_pool = query_pool;
  return WithForced(policy, 0, 0, 0);
}

AnyPolicy SketchByAlpha(int block_size, float alpha, int outliers, int query_pool) {
  AnyPolicy policy = SketchByMass(block_size, std::nanf(""), outliers, query_pool);
  policy.sketch.alpha = alpha;
  return policy;
}

AnyPolicy SketchByGain(int block_size, float gain, int outliers, int query_pool) {
  AnyPolicy policy = SketchByMass(block_size, std::nanf(""), outliers, query_pool);
  policy.sketch.gain = gain;
  return policy;
}

AnyPolicy ByQueries(AnyPolicy sketch) {
  sketch.sketch.query_metric = 1;
  return sketch;
}

AnyPolicy FlexPrefill(int block_size, float gamma, float tau, int min_budget, int max_budget) {
  AnyPolicy policy(FP_FLEXPREFILL);
  policy.common.block_size = block_size;
  policy.flex.gamma = gamma;
  policy.flex.tau = tau;
  policy.flex.min_budget = min_budget;
  policy.flex.max_budget = max_budget;
  return policy;
}

AnyPolicy MInference(int block_size, int vertical, int slash) {
  AnyPolicy policy(FP_MINFERENCE);
  policy.common.block_size = block_size;
  policy.minference.vertical = vertical;
  policy.minference.slash = slash;
  return policy;
}

AnyPolicy MInference(int block_size, const std::vector<fp_minference_head>& heads) {
  AnyPolicy policy = MInference(block_size, 0, 0);
  policy.minference.heads = heads.data();
  policy.minference.head_count = static_cast<int32_t>(heads.size());
  return policy;
}

AnyPolicy XAttention(int block_size, float threshold, int stride, float norm) {
  AnyPolicy policy(FP_XATTENTION);
  policy.common.block_size = block_size;
  policy.xattention.threshold = threshold;
  policy.xattention.stride = stride;
  policy.xattention.norm = norm;
  return policy;
}

AnyPolicy RRAttention(int block_size, float threshold, int stride) {
  AnyPolicy policy(FP_RRATTENTION);
  policy.common.block_size = block_size;
  policy.rrattention.threshold = threshold;
  policy.rrattention.stride = stride;
  return policy;
}

AnyPolicy SpargeByCdf(int block_size, float cdf, float similarity) {
  AnyPolicy policy(FP_SPARGE_ATTN);
  policy.common.block_size = block_size;
  policy.sparge.cdf = cdf;
  policy.sparge.similarity = similarity;
  return policy;
}

AnyPolicy SpargeByTopk(int block_size, float topk, float similarity) {
  AnyPolicy policy = SpargeByCdf(block_size, std::nanf(""), similarity);
  policy.sparge.topk = topk;
  return policy;
}

AnyPolicy Prism(int block_size, float mass, int rotary_dim, bool interleaved) {
  AnyPolicy policy(FP_PRISM);
  policy.common.block_size = block_size;
  policy.prism.mass = mass;
  policy.prism.rotary_dim = rotary_dim;
  policy.prism.interleaved = interleaved;
  return policy;
}

AnyPolicy SampleAttention(int block_size, float coverage, float sample_ratio, float window_ratio, int sample_rows) {
  AnyPolicy policy(FP_SAMPLE_ATTENTION);
  policy.common.block_size = block_size;
  policy.sample.coverage = coverage;
  policy.sample.sample_ratio = sample_ratio;
  policy.sample.window_ratio = window_ratio;
  policy.sample.sample_rows = sample_rows;
  return policy;
}

AnyPolicy InTokens(AnyPolicy minference) {
  minference.minference.rounding = FP_ROUND_TOKENS;
  return minference;
}

AnyPolicy Shared(AnyPolicy policy) {
  policy.common.share_heads = 1;
  return policy;
}

AnyPolicy Corrected(AnyPolicy policy) {
  policy.common.mean_correction = 1;
  return policy;
}

std::string Name(const AnyPolicy& policy) {
  std::ostringstream text;
  const fp_policy& c = policy.common;
  if (c.kind == FP_DENSE) text << "Dense(";
  if (c.kind == FP_STREAMING) text << "Streaming(";
  if (c.kind == FP_FLASHPREFILL) {
    text << "FlashPrefill(alpha=" << policy.flashprefill.alpha << " query_pool=" << policy.flashprefill.query_pool
         << " min_blocks=" << policy.flashprefill.min_blocks << " ";
  }
  if (c.kind == FP_SKETCH) {
    text << "Sketch(alpha=" << policy.sketch.alpha << " mass=" << policy.sketch.mass
         << " outliers=" << policy.sketch.outliers << " query_pool=" << policy.sketch.query_pool
         << " min_blocks=" << policy.sketch.min_blocks << " gain=" << policy.sketch.gain
         << " query_metric=" << policy.sketch.query_metric << " ";
  }
  if (c.kind == FP_FLEXPREFILL) {
    text << "FlexPrefill(gamma=" << policy.flex.gamma << " tau=" << policy.flex.tau
         << " min_budget=" << policy.flex.min_budget << " max_budget=" << policy.flex.max_budget
         << " cover=" << policy.flex.cover << " ";
  }
  if (c.kind == FP_MINFERENCE) {
    text << "MInference(vertical=" << policy.minference.vertical << " slash=" << policy.minference.slash
         << " heads=" << policy.minference.head_count << " rounding=" << policy.minference.rounding << " ";
  }
  if (c.kind == FP_XATTENTION) {
    text << "XAttention(threshold=" << policy.xattention.threshold << " stride=" << policy.xattention.stride
         << " norm=" << policy.xattention.norm << " thresholds=" << policy.xattention.head_count << " ";
  }
  if (c.kind == FP_RRATTENTION) {
    text << "RRAttention(threshold=" << policy.rrattention.threshold << " stride=" << policy.rrattention.stride << " ";
  }
  if (c.kind == FP_SPARGE_ATTN) {
    text << "SpargeAttn(cdf=" << policy.sparge.cdf << " topk=" << policy.sparge.topk
         << " similarity=" << policy.sparge.similarity << " ";
  }
  if (c.kind == FP_PRISM) {
    text << "Prism(mass=" << policy.prism.mass << " rotary_dim=" << policy.prism.rotary_dim
         << " interleaved=" << policy.prism.interleaved << " ";
  }
  if (c.kind == FP_SAMPLE_ATTENTION) {
    text << "SampleAttention(coverage=" << policy.sample.coverage << " sample_ratio=" << policy.sample.sample_ratio
         << " window_ratio=" << policy.sample.window_ratio << " sample_rows=" << policy.sample.sample_rows << " ";
  }
  text << "block_size=" << c.block_size << " sink=" << c.sink_blocks << " window=" << c.window_blocks
       << " tail=" << c.dense_tail_blocks << " share_heads=" << c.share_heads << " correction=" << c.mean_correction
       << ")";
  return text.str();
}

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
  if (!causal) text << ", not causal";
  if (!final_chunk) text << ", not final";
  text << (values == Values::kRandom ? ", random" : ", structured") << ", seed " << seed;
  return text.str();
}

// ---------------------------------------------------------------- memory

Memory::Memory(size_t bytes, bool sparse) : bytes_(std::max<size_t>(bytes, 1)), sparse_(sparse) {
  if (sparse) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) {
      data_ = nullptr;
      throw std::bad_alloc();
    }
  } else {
    data_ = std::malloc(bytes_); // no rounding up: a sanitizer sees the first byte too many
    if (!data_) throw std::bad_alloc();
    std::memset(data_, 0xff, bytes_); // all ones is a NaN in each dtype
  }
}

Memory::~Memory() {
  if (!data_) return;
  if (sparse_) {
    munmap(data_, bytes_);
  } else {
    std::free(data_);
  }
}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(sparse_, other.sparse_);
  return *this;
}

TensorMemory::TensorMemory(int32_t dtype, const int64_t (&extent)[4], Strides strides) {
  const bool packed = extent[0] == 0;
  const int64_t n[4] = {packed ? 1 : extent[0], extent[1], extent[2], extent[3]};
  int64_t* stride = tensor.stride;
  int64_t base = 0;
  // From the innermost axis outwards: each steps over what lies inside it, and a gap.
  const auto nest = [&](const int(&inside_out)[4], int64_t step, const int64_t(&gap)[4]) {
    for (int i = 0; i < 4; ++i) {
      const int axis = inside_out[i];
      stride[axis] = step;
      step = step * std::max<int64_t>(n[axis], 1) + gap[i];
    }
  };
  switch (strides) {
    case Strides::kContiguous:
      nest({3, 2, 1, 0}, 1, {0, 0, 0, 0});
      break;
    case Strides::kHeadMajor:
      nest({3, 1, 2, 0}, 1, {0, 0, 0, 0});
      break;
    case Strides::kPadded:
      nest({3, 2, 1, 0}, 1, {5, 7, 11, 0});
      base = 3;
      break;
    case Strides::kSpreadDim:
      nest({3, 2, 1, 0}, 3, {0, 0, 0, 0});
      break;
    case Strides::kDimMajor:
      nest({1, 3, 2, 0}, 1, {0, 0, 0, 0});
      break;
    case Strides::kReversed:
      nest({3, 2, 1, 0}, 1, {0, 0, 0, 0});
      break;
    case Strides::kFar:
      nest({3, 1, 2, 0}, 1, {0, 0, 0, 0});
      if (packed) {
        stride[2] = kVeryFarStep;
      } else {
        stride[0] = n[0] > 3 ? kFarStep : kVeryFarStep;
      }
      break;
  }
  int64_t elements = base + 1;
  for (int axis = 0; axis < 4; ++axis) elements += std::max<int64_t>(n[axis] - 1, 0) * stride[axis];
  if (strides == Strides::kReversed) {
    for (const int axis : {1, 2}) {
      base += std::max<int64_t>(n[axis] - 1, 0) * stride[axis];
      stride[axis] = -stride[axis];
    }
  }
  if (n[0] * n[1] * n[2] * n[3] == 0) elements = base = 0;
  memory = Memory(static_cast<size_t>(elements) * DtypeSize(dtype), strides == Strides::kFar);
  tensor.data = static_cast<char*>(memory.data()) + base * static_cast<int64_t>(DtypeSize(dtype));
  tensor.dtype = dtype;
  if (packed) stride[0] = kUnreadStride;
}

// ---------------------------------------------------------------- a case

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
    int64_t pages = 2; // of nobody
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
