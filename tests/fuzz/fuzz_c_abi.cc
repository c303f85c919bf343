// Fuzzes the C ABI: the input bytes become a small problem, policy, mask and execution, mostly sane and often not.
// Every buffer has exactly the size that the descriptor claims, so AddressSanitizer sees any step outside; whatever is
// refused must leave the output as it was, and whatever is accepted must run.
//
// Built by the preset `fuzz` for libFuzzer. Without libFuzzer (FLASHPREFILL_FUZZ_STANDALONE) a main() feeds it a fixed
// number of pseudo-random inputs, so that the ordinary tests give it a short run with any compiler.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "flashprefill/flashprefill.h"

namespace {

// Reads the input from its front; zeros once it is used up.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  template <typename T>
  T Raw() {
    T value{};
    const size_t n = std::min(sizeof(T), size_);
    if (n > 0) std::memcpy(&value, data_, n);
    data_ += n;
    size_ -= n;
    return value;
  }
  int Upto(int most) { return Raw<uint8_t>() % (most + 1); }
  bool OneIn(int n) { return Upto(n - 1) == n - 1; }

  // Usually the sane value, now and then anything at all.
  template <typename T>
  T Mostly(T sane) {
    return OneIn(64) ? Raw<T>() : sane;
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

// A heap block of exactly this many bytes, so that the sanitizer guards both ends.
struct Buffer {
  explicit Buffer(size_t bytes)
      : size(bytes), data(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))) {
    std::memset(data, 0x3c, (bytes + 63) / 64 * 64); // fp16 1.06, bf16 0.0115, fp32 0.0115
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  size_t size;
  uint8_t* data;
};

fp_tensor TensorOver(const Buffer& buffer, int dtype, int64_t tokens, int64_t heads, int64_t dim) {
  fp_tensor t{};
  t.data = buffer.data;
  t.dtype = dtype;
  t.stride[0] = tokens * heads * dim;
  t.stride[1] = heads * dim;
  t.stride[2] = dim;
  t.stride[3] = 1;
  return t;
}

size_t SizeOf(int dtype) { return dtype == FP_F32 ? 4 : 2; }

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

const fp_minference_head kHeads[16] = {{FP_A_SHAPE, 20, 30}, {FP_BLOCK_SPARSE, 2, 0}, {FP_VERTICAL_SLASH, 5, 7}};

const float kThresholds[16] = {0.5f, 0, 1, 0.9f};

void FillPolicy(Bytes& in, AnyPolicy& policy) {
  constexpr int kKinds[] = {0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12};
  const int kind = kKinds[in.Upto(10)];
  if (fp_policy_init(kind, &policy, sizeof policy) != FP_OK) std::abort();
  policy.common.kind = in.Mostly(policy.common.kind);
  policy.common.struct_size = in.Mostly(policy.common.struct_size);
  policy.common.block_size = in.Mostly(16 * (1 + in.Upto(4)));
  policy.common.sink_blocks = in.Mostly(in.Upto(2));
  policy.common.window_blocks = in.Mostly(in.Upto(2));
  policy.common.dense_tail_blocks = in.Mostly(in.Upto(1));
  policy.common.share_heads = in.Mostly(in.Upto(1));
  policy.common.mean_correction = in.Mostly(in.Upto(1));
  if (kind == FP_FLASHPREFILL) {
    policy.flashprefill.alpha = in.Mostly(static_cast<float>(in.Upto(20)) / 10);
    policy.flashprefill.query_pool = in.Mostly(1 + in.Upto(20));
    policy.flashprefill.min_blocks = in.Mostly(in.Upto(3));
  } else if (kind == FP_SKETCH) {
    policy.sketch.mass = in.Mostly(static_cast<float>(1 + in.Upto(9)) / 10);
    policy.sketch.alpha = in.Mostly(std::numeric_limits<float>::quiet_NaN());
    policy.sketch.outliers = in.Mostly(in.Upto(5));
    policy.sketch.query_pool = in.Mostly(1 + in.Upto(20));
    policy.sketch.min_blocks = in.Mostly(in.Upto(3));
    policy.sketch.query_metric = in.Mostly(in.Upto(1));
    if (in.Upto(2) == 0) {
      policy.sketch.gain = in.Mostly(static_cast<float>(1 + in.Upto(9)) / 11);
      policy.sketch.mass = std::numeric_limits<float>::quiet_NaN();
    }
  } else if (kind == FP_FLEXPREFILL) {
    policy.flex.gamma = in.Mostly(static_cast<float>(1 + in.Upto(9)) / 10);
    policy.flex.tau = in.Mostly(static_cast<float>(in.Upto(10)) / 10);
    policy.flex.min_budget = in.Mostly(in.Upto(40));
    policy.flex.max_budget = in.Mostly(in.OneIn(2) ? 40 + in.Upto(40) : 0);
    policy.flex.cover = in.Mostly(in.Upto(1));
  } else if (kind == FP_MINFERENCE) {
    policy.minference.vertical = in.Mostly(in.Upto(40));
    policy.minference.slash = in.Mostly(in.Upto(40));
    policy.minference.head_count = in.Mostly(in.Upto(3));
    policy.minference.rounding = in.Mostly(in.Upto(1));
    policy.minference.heads = kHeads;
  } else if (kind == FP_XATTENTION) {
    policy.xattention.threshold = in.Mostly(static_cast<float>(in.Upto(10)) / 10);
    policy.xattention.norm = in.Mostly(static_cast<float>(1 + in.Upto(10)) / 10);
    policy.xattention.stride = in.Mostly(4 << in.Upto(3));
    policy.xattention.head_count = in.Mostly(in.Upto(3));
    policy.xattention.head_thresholds = kThresholds;
  } else if (kind == FP_RRATTENTION) {
    policy.rrattention.threshold = in.Mostly(static_cast<float>(1 + in.Upto(9)) / 10);
    policy.rrattention.stride = in.Mostly(4 << in.Upto(3));
  } else if (kind == FP_SPARGE_ATTN) {
    policy.sparge.similarity = in.Mostly(static_cast<float>(in.Upto(10)) / 5 - 1);
    if (in.OneIn(2)) {
      policy.sparge.cdf = std::numeric_limits<float>::quiet_NaN();
      policy.sparge.topk = in.Mostly(static_cast<float>(in.Upto(10)) / 10);
    }
  } else if (kind == FP_PRISM) {
    policy.prism.mass = in.Mostly(static_cast<float>(1 + in.Upto(9)) / 10);
    policy.prism.rotary_dim = in.Mostly(2 * in.Upto(4));
    policy.prism.high_pairs = in.Mostly(in.Upto(3));
    policy.prism.low_pairs = in.Mostly(in.Upto(3));
    policy.prism.interleaved = in.Mostly(in.Upto(1));
  } else if (kind == FP_SAMPLE_ATTENTION) {
    policy.sample.coverage = in.Mostly(static_cast<float>(1 + in.Upto(9)) / 10);
    policy.sample.sample_ratio = in.Mostly(static_cast<float>(1 + in.Upto(9)) / 10);
    policy.sample.window_ratio = in.Mostly(static_cast<float>(in.Upto(10)) / 10);
    policy.sample.sample_rows = in.Mostly(1 + in.Upto(40));
  }
  // Only the structs of MInference and XAttention have a list at the address that they name.
  for (const int listed : {FP_MINFERENCE, FP_XATTENTION}) {
    if (policy.common.kind == listed && kind != listed) policy.common.kind = kind;
  }
}

int accepted = 0; // inputs that ran to the end

void Run(Bytes in) {
  const int batch = in.Upto(3);
  const int kv_heads = 1 + in.Upto(2), group = 1 + in.Upto(3), dim = 1 + in.Upto(40);
  const int64_t q_len = in.Upto(70), k_len = q_len + in.Upto(70);
  const int dtype = in.Upto(2), kv_dtype = in.OneIn(4) ? in.Upto(2) : dtype;
  const bool packed_q = in.OneIn(2), packed_k = in.OneIn(2), paged = in.OneIn(3);
  const int page_size = 1 + in.Upto(31),
            pages_per_seq = static_cast<int>((k_len + page_size - 1) / page_size) + in.Upto(1);
  const int page_count = batch * pages_per_seq + in.Upto(2);

  // Index arrays: true ones, then perhaps one entry changed.
  std::vector<int32_t> cu_q(batch + 1), cu_k(batch + 1), used(batch), table(static_cast<size_t>(batch) * pages_per_seq);
  for (int b = 0; b < batch; ++b) {
    const int q = in.Upto(static_cast<int>(q_len)), k = q + in.Upto(static_cast<int>(k_len - q_len));
    cu_q[b + 1] = cu_q[b] + q;
    cu_k[b + 1] = cu_k[b] + k;
    used[b] = packed_q ? k : static_cast<int32_t>(k_len);
  }
  const int64_t total_q = packed_q ? cu_q[batch] : batch * q_len;
  const int64_t total_k = cu_k[batch];
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>((i * 7) % std::max(1, page_count));
  for (auto* array : {&cu_q, &cu_k, &used, &table}) {
    if (!array->empty() && in.OneIn(32)) (*array)[in.Upto(255) % array->size()] = in.Raw<int32_t>();
  }

  const int q_heads = kv_heads * group;
  const int64_t k_rows = paged ? int64_t{page_count} * page_size : packed_k ? total_k : batch * k_len;
  const Buffer q(total_q * q_heads * dim * SizeOf(dtype)), out(q.size), lse(total_q * q_heads * sizeof(float));
  const Buffer k(k_rows * kv_heads * dim * SizeOf(kv_dtype)), v(k.size);

  fp_problem p;
  fp_problem_init(&p);
  p.struct_size = in.Mostly(p.struct_size);
  p.device = in.Mostly<int32_t>(FP_CPU);
  p.batch = batch;
  p.kv_heads = kv_heads;
  p.q_heads = q_heads;
  p.head_dim = dim;
  p.causal = in.Mostly(in.OneIn(8) ? 0 : 1);
  p.final_chunk = in.Mostly(in.Upto(1));
  p.softmax_scale = in.Mostly(0.3f);
  p.total_q = total_q;
  p.total_k = total_k;
  p.max_seqlen_q = q_len;
  p.max_seqlen_k = k_len;
  p.q = TensorOver(q, in.Mostly(dtype), q_len, q_heads, dim);
  p.k = TensorOver(k, kv_dtype, paged ? page_size : k_len, kv_heads, dim);
  p.v = TensorOver(v, kv_dtype, paged ? page_size : k_len, kv_heads, dim);
  if (p.q.dtype != dtype && SizeOf(p.q.dtype) != SizeOf(dtype))
    p.q.dtype = 99; // else it would claim more than there is
  if (packed_q) p.cu_seqlens_q = cu_q.data();
  if (packed_k) p.cu_seqlens_k = cu_k.data();
  if (paged || in.OneIn(4)) p.seqused_k = in.OneIn(16) ? nullptr : used.data();
  if (paged) {
    p.block_table = table.data();
    p.block_table_stride = pages_per_seq;
    p.pages_per_seq = pages_per_seq;
    p.page_size = page_size;
    p.page_count = page_count;
  }
  if (in.OneIn(32)) p.k.data = nullptr;

  AnyPolicy policy;
  FillPolicy(in, policy);

  fp_exec exec;
  fp_exec_init(&exec);
  exec.threads = in.Mostly(1);
  exec.backend = in.OneIn(2) ? "cpu" : in.OneIn(2) ? "reference" : nullptr;

  fp_output output;
  fp_output_init(&output);
  output.out = TensorOver(out, p.q.dtype, q_len, q_heads, dim);
  if (in.OneIn(2)) {
    output.lse = reinterpret_cast<float*>(lse.data);
    const int64_t tokens = packed_q ? total_q : q_len;
    output.lse_stride[0] = q_heads * tokens;
    output.lse_stride[1] = tokens;
    output.lse_stride[2] = 1;
  }
  if (in.OneIn(32)) output.out.data = nullptr;

  const auto untouched = [](const Buffer& buffer) {
    for (size_t i = 0; i < buffer.size; ++i) {
      if (buffer.data[i] != 0x3c) std::abort();
    }
  };
  const auto refused = [&](fp_status status) {
    if (status == FP_OK) return false;
    if (fp_last_error()[0] == 0) std::abort();
    untouched(out);
    untouched(lse);
    return true;
  };

  size_t bytes = 0;
  if (exec.threads > 64 || refused(fp_prefill_workspace(&p, &policy.common, &exec, &bytes))) return;
  const Buffer workspace(bytes);
  fp_block_mask mask;
  fp_block_mask_init(&mask);
  if (refused(fp_mask_describe(&p, &policy.common, &mask))) return;
  const Buffer bits(mask.heads * mask.tile_rows * mask.words * 8);
  mask.bits = reinterpret_cast<uint64_t*>(bits.data);
  const int64_t room = int64_t{mask.max_verticals} + mask.max_slashes;
  const Buffer vertical_slash(room > 0 ? p.batch * mask.heads * (2 + room) * 4 : 0);
  mask.vertical_slash = reinterpret_cast<int32_t*>(vertical_slash.data);
  const size_t short_by = in.OneIn(16) && bytes > 0 ? 1 : 0;
  if (refused(fp_prefill(&p, &policy.common, &exec, &mask, &output, workspace.data, bytes - short_by))) return;

  // A hand-made mask: the bits that select wrote, some turned around.
  for (int i = in.Upto(3); i > 0 && bits.size > 0; --i) bits.data[in.Raw<uint16_t>() % bits.size] ^= in.Raw<uint8_t>();
  size_t attend_bytes = 0;
  if (fp_attend_workspace(&p, &mask, &exec, &attend_bytes) != FP_OK) std::abort();
  const Buffer attend_workspace(attend_bytes);
  if (fp_attend(&p, &mask, &exec, &output, attend_workspace.data, attend_bytes) != FP_OK) std::abort();
  ++accepted;
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Run(Bytes(data, size));
  return 0;
}

#ifdef FLASHPREFILL_FUZZ_STANDALONE
int main(int argc, char** argv) {
  const int runs = argc > 1 ? std::atoi(argv[1]) : 2000;
  std::mt19937 random(7);
  std::vector<uint8_t> input(256);
  for (int i = 0; i < runs; ++i) {
    for (uint8_t& byte : input) byte = static_cast<uint8_t>(random());
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%d inputs, %d accepted and run, no crash\n", runs, accepted);
  return accepted > runs / 10 && accepted < runs ? 0 : 1; // else it would test only one side
}
#endif
