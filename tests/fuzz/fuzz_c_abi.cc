// Fuzzes the C ABI: the input bytes become a small problem, policy, mask and execution, mostly sane and often not.
// Every buffer has exactly the size that the descriptor claims, so AddressSanitizer sees any step outside. A call that
// is refused must leave the output as it was; a call that is accepted must run.
//
// Built by the preset `fuzz` for libFuzzer, and with standalone.cc as a short run among the tests.
#include <cmath>
#include <optional>
#include <sstream>
#include <vector>

#include "core/half.h"
#include "fuzz.h"
#include "random_policy.h"

namespace flashprefill::test {
namespace {

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

size_t SizeOf(int dtype) { return dtype == FP_F32 ? 4 : dtype == FP_E4M3 ? 1 : 2; }

// A problem with all its memory.
class Call {
 public:
  explicit Call(Bytes& in)
      : batch_(in.Upto(3)),
        kv_heads_(1 + in.Upto(2)),
        group_(1 + in.Upto(3)),
        dim_(1 + in.Upto(40)),
        q_len_(in.Upto(70)),
        k_len_(q_len_ + in.Upto(70)),
        dtype_(in.Upto(2)),
        k_dtype_(in.OneIn(3) ? in.Upto(FP_E4M3) : dtype_),
        v_dtype_(in.OneIn(8) ? in.Upto(FP_E4M3) : k_dtype_),
        packed_q_(in.OneIn(2)),
        packed_k_(in.OneIn(2)),
        paged_(in.OneIn(3)),
        page_size_(1 + in.Upto(31)),
        pages_per_seq_(static_cast<int>((k_len_ + page_size_ - 1) / page_size_) + in.Upto(1)),
        page_count_(batch_ * pages_per_seq_ + in.Upto(2)) {
    FillIndexArrays(in);
    const int64_t k_rows = paged_ ? int64_t{page_count_} * page_size_ : packed_k_ ? cu_k_[batch_] : batch_ * k_len_;
    q_ = Take(TotalQ() * q_heads() * dim_ * SizeOf(dtype_));
    out_ = Take(TotalQ() * q_heads() * dim_ * SizeOf(dtype_));
    lse_ = Take(TotalQ() * q_heads() * sizeof(float));
    k_ = Take(k_rows * kv_heads_ * dim_ * SizeOf(k_dtype_));
    v_ = Take(k_rows * kv_heads_ * dim_ * SizeOf(v_dtype_));
    const int numbers = in.Upto(4); // 0, 1: all the same
    for (Buffer* const each : {q_, k_, v_}) {
      if (numbers > 1) each->Scatter(in.Raw<uint8_t>(), numbers < 4);
    }
    finite_ = numbers < 4;
    FillProblem(in);
    if (k_dtype_ == FP_E4M3 || in.OneIn(64)) AddScale(in, problem_.k_scale, problem_.k_scale_stride);
    if (v_dtype_ == FP_E4M3 || in.OneIn(64)) AddScale(in, problem_.v_scale, problem_.v_scale_stride);
    FillOutput(in);
  }

  int q_heads() const { return kv_heads_ * group_; }
  const fp_problem& problem() const { return problem_; }
  const fp_output& output() const { return output_; }
  int dim() const { return dim_; }
  bool finite() const { return finite_; } // in q, k and v

  // Finite numbers make finite outputs, whatever the mask holds.
  void CheckOutput() const {
    if (!finite_) return;
    for (size_t i = 0; i < out_->size / SizeOf(dtype_); ++i) {
      if (!std::isfinite(LoadElement(out_->data, dtype_, static_cast<int64_t>(i))))
        Finding("an output that is not finite");
    }
  }

  // Copies of out and lse, to see whether a refused call wrote any of them.
  std::vector<uint8_t> Outputs() const {
    std::vector<uint8_t> all(out_->data, out_->data + out_->size);
    all.insert(all.end(), lse_->data, lse_->data + lse_->size);
    return all;
  }

 private:
  Buffer* Take(size_t bytes) {
    buffers_.push_back(std::make_unique<Buffer>(bytes));
    return buffers_.back().get();
  }

  int64_t TotalQ() const { return packed_q_ ? cu_q_[batch_] : batch_ * q_len_; }

  // True ones, then perhaps one entry changed.
  void FillIndexArrays(Bytes& in) {
    cu_q_.resize(batch_ + 1);
    cu_k_.resize(batch_ + 1);
    used_.resize(batch_);
    table_.resize(static_cast<size_t>(batch_) * pages_per_seq_);
    for (int b = 0; b < batch_; ++b) {
      const int q = in.Upto(static_cast<int>(q_len_)), k = q + in.Upto(static_cast<int>(k_len_ - q_len_));
      cu_q_[b + 1] = cu_q_[b] + q;
      cu_k_[b + 1] = cu_k_[b] + k;
      used_[b] = packed_q_ ? k : static_cast<int32_t>(k_len_);
    }
    for (size_t i = 0; i < table_.size(); ++i) table_[i] = static_cast<int32_t>((i * 7) % std::max(1, page_count_));
    total_q_ = TotalQ(), total_k_ = cu_k_[batch_];
  }

  void FillProblem(Bytes& in) {
    fp_problem& p = problem_;
    fp_problem_init(&p);
    p.struct_size = in.Mostly(p.struct_size);
    p.device = in.Mostly<int32_t>(FP_CPU);
    p.batch = batch_;
    p.kv_heads = kv_heads_;
    p.q_heads = q_heads();
    p.head_dim = dim_;
    p.causal = in.Mostly(in.OneIn(8) ? 0 : 1);
    p.final_chunk = in.Mostly(in.Upto(1));
    p.softmax_scale = in.Mostly(0.3f);
    finite_ = finite_ && p.softmax_scale == 0.3f;
    p.total_q = total_q_;
    p.total_k = total_k_;
    p.max_seqlen_q = q_len_;
    p.max_seqlen_k = k_len_;
    p.q = TensorOver(*q_, in.Mostly(dtype_), q_len_, q_heads(), dim_);
    p.k = TensorOver(*k_, in.Mostly(k_dtype_), paged_ ? page_size_ : k_len_, kv_heads_, dim_);
    p.v = TensorOver(*v_, in.Mostly(v_dtype_), paged_ ? page_size_ : k_len_, kv_heads_, dim_);
    // Another type of the same size at most: it would claim more than there is.
    const auto limit = [](int32_t& dtype, int is) {
      if (dtype != is && SizeOf(dtype) != SizeOf(is)) dtype = 99;
    };
    limit(p.q.dtype, dtype_), limit(p.k.dtype, k_dtype_), limit(p.v.dtype, v_dtype_);
    if (p.q.dtype != dtype_ || p.k.dtype != k_dtype_ || p.v.dtype != v_dtype_) finite_ = false;
    if (packed_q_) p.cu_seqlens_q = cu_q_.data();
    if (packed_k_) p.cu_seqlens_k = cu_k_.data();
    if (paged_ || in.OneIn(4)) p.seqused_k = in.OneIn(16) ? nullptr : used_.data();
    if (paged_) {
      p.block_table = table_.data();
      p.block_table_stride = pages_per_seq_;
      p.pages_per_seq = pages_per_seq_;
      p.page_size = page_size_;
      p.page_count = page_count_;
    }
    if (in.OneIn(8)) {
      final_chunks_.resize(batch_);
      for (uint8_t& each : final_chunks_) each = in.Mostly(static_cast<uint8_t>(in.Upto(1)));
      p.final_chunks = final_chunks_.data();
    }
    if (in.OneIn(32)) p.k.data = nullptr;
    for (auto* array : {&cu_q_, &cu_k_, &used_, &table_}) {
      if (!array->empty() && in.OneIn(32)) (*array)[in.Upto(255) % array->size()] = in.Raw<int32_t>();
    }
  }

  // Scales of 8-bit numbers: one for all, for each KV head, or for each sequence and head; or none.
  void AddScale(Bytes& in, const float*& scale, int64_t (&stride)[2]) {
    const int by = in.Upto(3);
    if (by == 0) return;
    stride[0] = by == 3 ? kv_heads_ : 0;
    stride[1] = by >= 2 ? 1 : 0;
    const int64_t count = by == 1 ? 1 : by == 2 ? kv_heads_ : int64_t{batch_} * kv_heads_;
    Buffer* const scales = Take(count * sizeof(float));
    float* const values = reinterpret_cast<float*>(scales->data);
    for (int64_t i = 0; i < count; ++i) {
      const auto sane = static_cast<float>(1 + in.Upto(20)) / 10;
      values[i] = in.Mostly(sane);
      finite_ = finite_ && values[i] == sane;
    }
    scale = values;
  }

  void FillOutput(Bytes& in) {
    fp_output_init(&output_);
    output_.out = TensorOver(*out_, problem_.q.dtype, q_len_, q_heads(), dim_);
    if (in.OneIn(2)) {
      output_.lse = reinterpret_cast<float*>(lse_->data);
      const int64_t tokens = packed_q_ ? total_q_ : q_len_;
      output_.lse_stride[0] = q_heads() * tokens;
      output_.lse_stride[1] = tokens;
      output_.lse_stride[2] = 1;
    }
    if (in.OneIn(32)) output_.out.data = nullptr;
  }

  const int batch_, kv_heads_, group_, dim_;
  const int64_t q_len_, k_len_;
  const int dtype_, k_dtype_, v_dtype_;
  const bool packed_q_, packed_k_, paged_;
  const int page_size_, pages_per_seq_, page_count_;
  int64_t total_q_ = 0, total_k_ = 0;
  bool finite_ = true;
  std::vector<int32_t> cu_q_, cu_k_, used_, table_;
  std::vector<uint8_t> final_chunks_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  Buffer *q_, *k_, *v_, *out_, *lse_;
  fp_problem problem_;
  fp_output output_;
};

// A described mask with memory of exactly the size that it needs.
struct Mask {
  explicit Mask(const fp_block_mask& described, int32_t batch)
      : view(described),
        bits(described.heads * described.tile_rows * described.words * 8),
        lists(Room() > 0 ? int64_t{batch} * described.heads * (2 + Room()) * 4 : 0),
        keys(described.max_keys > 0 ? described.heads * described.segment_rows * KeyStride() * 4 : 0),
        skipped(described.heads * described.tile_rows * 4) {
    view.bits = reinterpret_cast<uint64_t*>(bits.data);
    view.vertical_slash = reinterpret_cast<int32_t*>(lists.data);
    view.key_lists = reinterpret_cast<int32_t*>(keys.data);
    view.skipped = reinterpret_cast<int32_t*>(skipped.data);
  }
  int64_t Room() const { return int64_t{view.max_verticals} + view.max_slashes; }
  int64_t KeyStride() const { return 2 + int64_t{view.max_keys}; }
  int64_t KeyLists() const { return view.max_keys > 0 ? view.heads * view.segment_rows : 0; }
  fp_block_mask view;
  Buffer bits, lists, keys, skipped;
};

// Whether the call was refused; then it has a message, and the outputs are as before.
bool Refused(fp_status status, const Call& call, const std::vector<uint8_t>& before) {
  if (status == FP_OK) return false;
  if (fp_last_error()[0] == 0) Finding("a refusal without a message");
  if (call.Outputs() != before) Finding("a refused call wrote an output");
  return true;
}

// Attends over a mask and counts what it keeps. The mask's lists may be anything.
void UseMask(const Call& call, const Mask& mask, const fp_exec& exec) {
  const std::vector<uint8_t> before = call.Outputs();
  size_t bytes = 0;
  if (Refused(fp_attend_workspace(&call.problem(), &mask.view, &exec, &bytes), call, before)) return;
  const Buffer workspace(bytes);
  if (!Refused(fp_attend(&call.problem(), &mask.view, &exec, &call.output(), workspace.data, bytes), call, before))
    call.CheckOutput();
  std::vector<int64_t> kept(static_cast<size_t>(call.problem().batch) * mask.view.heads), overflowed(kept.size());
  fp_stats stats;
  fp_stats_init(&stats);
  stats.kept = kept.data();
  stats.overflowed = overflowed.data();
  fp_mask_stats(&call.problem(), &mask.view, &stats);
}

// A mask of Dense's geometry, with lists of its own, of lines or of keys: ascending in most cases.
void UseMaskByHand(Bytes& in, const Call& call, const fp_exec& exec) {
  const AnyPolicy dense = Dense(16 * (1 + in.Upto(4)));
  fp_block_mask view;
  fp_block_mask_init(&view);
  if (fp_mask_describe(&call.problem(), dense.get(), &view) != FP_OK) return;
  const bool gathers = in.OneIn(2);
  view.max_verticals = in.Mostly(gathers ? 0 : in.Upto(12));
  view.max_slashes = in.Mostly(gathers ? 0 : in.Upto(12));
  view.max_keys = gathers ? in.Upto(40) : 0;
  view.segment_tiles = in.Mostly(1 + in.Upto(2));
  view.skip = in.OneIn(4) ? in.Mostly(0.1f) : 0;
  if (view.max_verticals < 0 || view.max_verticals > 12 || view.max_slashes < 0 || view.max_slashes > 12) return;
  if (view.max_keys > 0 && view.segment_tiles > 0) {
    view.segment_rows =
        call.problem().total_q / (int64_t{view.segment_tiles} * view.tile_tokens) + call.problem().batch;
  }
  Mask mask(view, call.problem().batch);
  for (int64_t list = 0; list < mask.KeyLists(); ++list) {
    int32_t* at = mask.view.key_lists + list * mask.KeyStride();
    at[0] = in.Mostly(in.Upto(view.max_keys));
    at[1] = in.Mostly(at[0] + in.Upto(1));
    for (int64_t i = 2, next = 0; i < mask.KeyStride(); ++i) {
      next += in.Upto(3);
      at[i] = in.Mostly(static_cast<int32_t>(next++));
    }
  }
  const int64_t stride = 2 + mask.Room();
  for (int64_t list = 0; mask.Room() > 0 && list < call.problem().batch * view.heads; ++list) {
    int32_t* at = mask.view.vertical_slash + list * stride;
    at[0] = in.Mostly(in.Upto(view.max_verticals));
    at[1] = in.Mostly(in.Upto(view.max_slashes));
    for (int64_t i = 2, next = 0; i < stride; ++i) {
      if (i == 2 + view.max_verticals) next = 0;
      next += in.Upto(15);
      at[i] = in.Mostly(static_cast<int32_t>(next++));
    }
  }
  for (size_t i = 0; i < mask.bits.size; ++i) mask.bits.data[i] = in.Raw<uint8_t>();
  UseMask(call, mask, exec);
}

// A guard with all its memory, and results in exactly the room that the header tells.
class RandomGuard {
 public:
  RandomGuard(Bytes& in, const fp_problem& p)
      : heads_(static_cast<size_t>(std::max(0, p.batch)) * static_cast<size_t>(std::max(0, p.q_heads))),
        shares_(3 * heads_ * sizeof(float)),
        numbers_(3 * heads_ * sizeof(int32_t)),
        sums_(static_cast<size_t>(std::max(0, p.batch)) * 3 * sizeof(double)),
        levels_(static_cast<size_t>(std::max(0, p.q_heads)) * sizeof(float)) {
    fp_guard_init(&view);
    view.mode = in.Mostly(in.Upto(2));
    view.rows = in.Mostly(in.Upto(20));
    view.layer = in.Mostly(in.Upto(3));
    view.seed = in.Raw<uint8_t>();
    view.target = in.Mostly(static_cast<float>(1 + in.Upto(9)) / 10);
    view.risk = in.Mostly(0.001f);
    float* shares = reinterpret_cast<float*>(shares_.data);
    int32_t* numbers = reinterpret_cast<int32_t*>(numbers_.data);
    view.recall = in.OneIn(8) ? nullptr : shares;
    view.recall_low = shares + heads_;
    view.recall_p05 = shares + 2 * heads_;
    view.rows_audited = numbers;
    view.missed_block = numbers + heads_;
    view.outcome = in.OneIn(8) ? nullptr : numbers + 2 * heads_;
    view.moments = reinterpret_cast<double*>(sums_.data);
    if (in.OneIn(2)) return;
    view.levels = reinterpret_cast<float*>(levels_.data);
    for (size_t h = 0; h < levels_.size / sizeof(float); ++h)
      view.levels[h] = in.Mostly(static_cast<float>(in.Upto(4)));
  }

  // What must hold of results, unless NaN or infinity went in.
  void Check(const Call& call) const {
    if (!call.finite()) return;
    for (size_t i = 0; view.recall && i < heads_; ++i) {
      if (!(view.recall[i] >= 0 && view.recall[i] <= 1.0001f)) Finding("a recall that is no share");
      if (!(view.recall_low[i] <= view.recall[i])) Finding("a bound that is above its recall");
    }
  }

  fp_guard view;

 private:
  size_t heads_;
  Buffer shares_, numbers_, sums_, levels_;
};

// Audits a mask whose lists may be anything; the mask may be repaired.
void AuditMask(const Call& call, Mask& mask, fp_exec exec, RandomGuard& guard) {
  exec.guard = &guard.view;
  const std::vector<uint8_t> before = call.Outputs();
  size_t bytes = 0;
  if (Refused(fp_audit_workspace(&call.problem(), &mask.view, &exec, &bytes), call, before)) return;
  const Buffer workspace(bytes);
  if (!Refused(fp_audit(&call.problem(), &mask.view, &exec, workspace.data, bytes), call, before)) guard.Check(call);
}

// One of the backend's instruction sets, or "" for the best.
std::string RandomTarget(Bytes& in, const char* backend) {
  char all[256] = "";
  fp_backend_targets(backend, all, sizeof all);
  std::istringstream names(all);
  std::string name;
  for (int i = in.Upto(7); i > 0; --i) {
    if (!(names >> name)) return "";
  }
  return name;
}

// An indexer for VSPrefill: weights in exactly the room that the policy tells, and perhaps logits, of nothing or of
// anything.
class RandomIndexer {
 public:
  RandomIndexer(Bytes& in, const Call& call, fp_vsprefill& v)
      : hidden_(in.Upto(6)),
        up_(Floats(call, 2 * call.dim())),
        bias_(Floats(call, 1)),
        vertical_(Floats(call, 1)),
        slash_(Floats(call, 1)),
        logit_tokens_(in.OneIn(3) ? in.Upto(200) : 0),
        logits_(static_cast<size_t>(std::max(0, call.problem().batch)) * KvHeads(call) * logit_tokens_ *
                sizeof(fp_vsprefill_logits)) {
    for (Buffer* each : {&up_, &bias_, &vertical_, &slash_}) each->Scatter(in.Raw<uint8_t>(), true);
    if (in.OneIn(2)) std::memset(logits_.data, 0, logits_.size);
    if (in.OneIn(32)) return; // no weights
    v.kv_heads = in.Mostly(call.problem().kv_heads);
    v.head_dim = in.Mostly(call.dim());
    v.hidden = hidden_;
    v.up = reinterpret_cast<const float*>(up_.data);
    v.bias = reinterpret_cast<const float*>(bias_.data);
    v.vertical = reinterpret_cast<const float*>(vertical_.data);
    v.slash = in.OneIn(64) ? nullptr : reinterpret_cast<const float*>(slash_.data);
    v.logit_tokens = logit_tokens_;
    if (logit_tokens_ > 0) v.logits = reinterpret_cast<fp_vsprefill_logits*>(logits_.data);
  }

 private:
  static size_t KvHeads(const Call& call) { return static_cast<size_t>(std::max(0, call.problem().kv_heads)); }
  size_t Floats(const Call& call, int per_unit) const { return KvHeads(call) * hidden_ * per_unit * sizeof(float); }

  const int hidden_;
  Buffer up_, bias_, vertical_, slash_;
  const int64_t logit_tokens_;
  Buffer logits_;
};

void Run(Bytes in) {
  Call call(in);
  RandomPolicy random(in, call.q_heads());
  std::optional<RandomIndexer> indexer;
  if (random.policy.common.kind == FP_VSPREFILL && random.policy.common.struct_size == sizeof(fp_vsprefill))
    indexer.emplace(in, call, random.policy.As<fp_vsprefill>());
  const fp_policy* policy = random.policy.get();
  fp_exec exec;
  fp_exec_init(&exec);
  exec.threads = in.Mostly(1);
  if (exec.threads > 64) return;
  exec.backend = in.OneIn(2) ? "cpu" : in.OneIn(2) ? "reference" : nullptr;
  const std::string target = exec.backend ? RandomTarget(in, exec.backend) : "";
  if (!target.empty()) exec.target = target.c_str();
  if (in.OneIn(4)) UseMaskByHand(in, call, exec);

  const std::vector<uint8_t> before = call.Outputs();
  const fp_problem& p = call.problem();
  RandomGuard guard(in, p);
  const fp_exec unguarded = exec;
  if (in.OneIn(2)) exec.guard = &guard.view;
  size_t bytes = 0;
  if (Refused(fp_prefill_workspace(&p, policy, &exec, &bytes), call, before)) return;
  if (fp_policy_print(policy, nullptr, 0) == 0) Finding("an accepted policy is not printed");
  const Buffer workspace(bytes);
  fp_block_mask described;
  fp_block_mask_init(&described);
  if (Refused(fp_mask_describe(&p, policy, &described), call, before)) return;
  Mask mask(described, p.batch);
  const size_t short_by = in.OneIn(16) && bytes > 0 ? 1 : 0;
  if (Refused(fp_prefill(&p, policy, &exec, &mask.view, &call.output(), workspace.data, bytes - short_by), call,
              before))
    return;
  ++accepted;
  call.CheckOutput();
  if (exec.guard) guard.Check(call);

  // The mask that select wrote, with some bits and list entries changed.
  for (int i = in.Upto(3); i > 0 && mask.bits.size > 0; --i) {
    mask.bits.data[in.Raw<uint16_t>() % mask.bits.size] ^= in.Raw<uint8_t>();
  }
  for (int i = in.Upto(2); i > 0 && mask.lists.size > 0; --i) {
    mask.view.vertical_slash[in.Raw<uint16_t>() % (mask.lists.size / 4)] += in.Upto(8) - 4;
  }
  for (int i = in.Upto(2); i > 0 && mask.keys.size > 0; --i) {
    mask.view.key_lists[in.Raw<uint16_t>() % (mask.keys.size / 4)] += in.Upto(8) - 4;
  }
  AuditMask(call, mask, unguarded, guard);
  UseMask(call, mask, unguarded);
}

} // namespace
} // namespace flashprefill::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  flashprefill::test::Run(flashprefill::test::Bytes(data, size));
  return 0;
}
