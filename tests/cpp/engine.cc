// Calls into the library and back: see engine.h.
#include "engine.h"

#include <gtest/gtest.h>

#include <cstring>
#include <sstream>

#include "core/backend.h"
#include "core/key_list.h"
#include "core/vertical_slash.h"

namespace flashprefill::test {
namespace {

void ExpectOk(fp_status status, const char* what) { EXPECT_EQ(status, FP_OK) << what << ": " << fp_last_error(); }

struct Execution {
  fp_exec exec;
  Execution(const Engine& engine, int threads) {
    fp_exec_init(&exec);
    exec.backend = engine.backend.c_str();
    exec.target = engine.target.empty() ? nullptr : engine.target.c_str();
    exec.threads = threads;
  }
};

// Exactly `bytes` bytes at 64-byte alignment, so that a sanitizer sees the first byte too many, all NaN.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    if (posix_memalign(&data_, kWorkspaceAlign, bytes) != 0) throw std::bad_alloc();
    std::memset(data_, 0xff, bytes);
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

// Memory for out and lse, full of NaN, with gaps that must still be full of NaN afterwards.
class OutputMemory {
 public:
  OutputMemory(const fp_problem& p, Strides strides, bool want_lse = true) : p_(p) {
    const bool packed = p.cu_seqlens_q != nullptr;
    const int64_t tokens = packed ? p.total_q : p.max_seqlen_q;
    out_ = TensorMemory(p.q.dtype, {packed ? 0 : p.batch, tokens, p.q_heads, p.head_dim}, strides);
    fp_output_init(&output);
    output.out = out_.tensor;
    const int64_t row = tokens + 3;
    output.lse_stride[0] = packed ? int64_t{1} << 40 : p.q_heads * row; // packed: not to be read
    output.lse_stride[1] = row;
    output.lse_stride[2] = 1;
    lse_.assign(static_cast<size_t>((packed ? 1 : p.batch) * p.q_heads * row), kUntouched);
    output.lse = want_lse ? lse_.data() : nullptr;
  }

  Attended Gather() {
    Attended a;
    const size_t size = DtypeSize(p_.q.dtype);
    std::vector<bool> ours(out_.memory.sparse() ? 0 : out_.memory.bytes() / size);
    const char* begin = static_cast<const char*>(out_.memory.data());
    const int64_t base = (static_cast<const char*>(output.out.data) - begin) / static_cast<int64_t>(size);
    for (int b = 0; b < p_.batch; ++b) {
      const Sequence s = SequenceOf(p_, b);
      for (int64_t i = 0; i < s.q_len; ++i) {
        for (int64_t h = 0; h < p_.q_heads; ++h) {
          const int64_t row = RowOffset(p_, output.out.stride, s, i, h);
          for (int64_t d = 0; d < p_.head_dim; ++d) {
            const int64_t at = row + d * output.out.stride[3];
            a.out.push_back(LoadElement(output.out.data, output.out.dtype, at));
            if (!ours.empty()) ours[base + at] = true;
          }
          if (!output.lse) continue;
          float& lse = lse_[LseOffset(p_, output.lse_stride, s, i, h)];
          a.lse.push_back(lse);
          lse = kUntouched;
        }
      }
    }
    int64_t strays = 0;
    for (size_t i = 0; i < ours.size(); ++i) {
      for (size_t byte = 0; !ours[i] && byte < size; ++byte)
        strays += static_cast<uint8_t>(begin[i * size + byte]) != 0xff;
    }
    for (const float x : lse_) strays += x != kUntouched;
    EXPECT_EQ(strays, 0) << "bytes written between the rows of out or lse";
    return a;
  }

  fp_output output;

 private:
  static constexpr float kUntouched = -12345.0f;
  const fp_problem& p_;
  TensorMemory out_;
  std::vector<float> lse_;
};

} // namespace

Engine Reference() { return {"reference", ""}; }

std::vector<Engine> OtherEngines() {
  std::vector<Engine> engines;
  for (const Backend* backend : Backends()) {
    if (backend->device != FP_CPU || !backend->available() || std::string(backend->name) == "reference") continue;
    std::vector<std::string> targets = backend->targets();
    if (targets.empty()) targets.push_back("");
    for (const std::string& target : targets) engines.push_back({backend->name, target});
  }
  return engines;
}

std::vector<Engine> AllEngines() {
  std::vector<Engine> engines = OtherEngines();
  engines.push_back(Reference());
  return engines;
}

Mask::Mask(const fp_problem& problem, const fp_policy* policy) {
  fp_block_mask_init(&view);
  ExpectOk(fp_mask_describe(&problem, policy, &view), "fp_mask_describe");
  bits.assign(static_cast<size_t>(view.heads * view.tile_rows * view.words), ~uint64_t{0});
  counts.assign(static_cast<size_t>(view.heads * view.tile_rows), -99);
  fallback.assign(static_cast<size_t>(problem.batch), -99);
  vertical_slash.assign(static_cast<size_t>(problem.batch * view.heads * VerticalSlashStride(view)), -99);
  key_lists.assign(static_cast<size_t>(view.heads * view.segment_rows * KeyListStride(view)), -99);
  skipped.assign(counts.size(), -99);
  PointAtOwn();
}

Mask& Mask::operator=(const Mask& other) {
  view = other.view;
  bits = other.bits;
  counts = other.counts;
  fallback = other.fallback;
  vertical_slash = other.vertical_slash;
  key_lists = other.key_lists;
  skipped = other.skipped;
  PointAtOwn();
  return *this;
}

void Mask::PointAtOwn() {
  view.bits = bits.data();
  view.counts = counts.data();
  view.fallback = fallback.data();
  view.vertical_slash = vertical_slash.empty() ? nullptr : vertical_slash.data();
  view.key_lists = key_lists.empty() ? nullptr : key_lists.data();
  view.skipped = const_cast<int32_t*>(skipped.data());
}

std::vector<int32_t> Mask::Keys(const Sequence& s, int64_t head, int64_t segment) const {
  const KeyList list = KeyList::Of(view, s, head, segment);
  return {list.keys, list.keys + list.count};
}

Mask RandomMask(const fp_problem& problem, int block_size, bool share_heads, int32_t mean_correction, double density,
                uint64_t seed) {
  AnyPolicy policy = Dense(block_size);
  policy.common.share_heads = share_heads;
  policy.common.mean_correction = mean_correction;
  Mask mask(problem, policy.get());
  std::mt19937_64 random(seed);
  std::bernoulli_distribution keep(density);
  for (uint64_t& word : mask.bits) {
    for (int bit = 0; bit < 64; ++bit) {
      if (!keep(random)) word &= ~(uint64_t{1} << bit);
    }
  }
  return mask;
}

Mask WithKeyLists(const fp_problem& problem, Mask mask, int segment_tiles, int max_keys, double density,
                  uint64_t seed) {
  mask.view.segment_tiles = segment_tiles;
  mask.view.max_keys = max_keys;
  mask.view.segment_rows = SegmentRows(problem, mask.view);
  mask.key_lists.assign(static_cast<size_t>(mask.view.heads * mask.view.segment_rows * KeyListStride(mask.view)), -99);
  mask.PointAtOwn();
  std::mt19937_64 random(seed);
  std::bernoulli_distribution keep(density);
  for (int b = 0; b < problem.batch; ++b) {
    const Sequence s = SequenceOf(problem, b);
    for (int h = 0; h < mask.view.heads; ++h) {
      for (int64_t i = 0; i < Segments(mask.view, s); ++i) {
        int32_t* list = KeyListAt(mask.view, s, h, i);
        list[0] = list[1] = 0;
        for (int64_t t = 0; t < s.k_len; ++t) {
          if (!keep(random)) continue;
          if (list[0] < max_keys) list[2 + list[0]++] = static_cast<int32_t>(t);
          ++list[1];
        }
      }
    }
  }
  return mask;
}

Mask Select(const Engine& engine, const fp_problem& problem, const AnyPolicy& policy, int threads) {
  Execution run(engine, threads);
  Mask mask(problem, policy.get());
  size_t bytes = 0;
  ExpectOk(fp_select_workspace(&problem, policy.get(), &run.exec, &bytes), "fp_select_workspace");
  Scratch scratch(bytes);
  ExpectOk(fp_select(&problem, policy.get(), &run.exec, &mask.view, scratch.data(), bytes), "fp_select");
  return mask;
}

Attended Attend(const Engine& engine, const fp_problem& problem, const Mask& mask, int threads, Strides out,
                bool want_lse) {
  Execution run(engine, threads);
  size_t bytes = 0;
  ExpectOk(fp_attend_workspace(&problem, &mask.view, &run.exec, &bytes), "fp_attend_workspace");
  Scratch scratch(bytes);
  OutputMemory memory(problem, out, want_lse);
  ExpectOk(fp_attend(&problem, &mask.view, &run.exec, &memory.output, scratch.data(), bytes), "fp_attend");
  return memory.Gather();
}

Prefilled Prefill(const Engine& engine, const fp_problem& problem, const AnyPolicy& policy, int threads, Strides out) {
  Execution run(engine, threads);
  Prefilled result{Mask(problem, policy.get()), {}};
  size_t bytes = 0;
  ExpectOk(fp_prefill_workspace(&problem, policy.get(), &run.exec, &bytes), "fp_prefill_workspace");
  Scratch scratch(bytes);
  OutputMemory memory(problem, out);
  ExpectOk(fp_prefill(&problem, policy.get(), &run.exec, &result.mask.view, &memory.output, scratch.data(), bytes),
           "fp_prefill");
  result.attended = memory.Gather();
  return result;
}

Attended PrefillWithoutMask(const Engine& engine, const fp_problem& problem, const AnyPolicy& policy) {
  Execution run(engine, 2);
  size_t bytes = 0;
  ExpectOk(fp_prefill_workspace(&problem, policy.get(), &run.exec, &bytes), "fp_prefill_workspace");
  Scratch scratch(bytes);
  OutputMemory memory(problem, Strides::kContiguous);
  ExpectOk(fp_prefill(&problem, policy.get(), &run.exec, nullptr, &memory.output, scratch.data(), bytes), "fp_prefill");
  return memory.Gather();
}

Prefilled PrefillWithCounts(const Engine& engine, const fp_problem& problem, const AnyPolicy& policy) {
  Execution run(engine, 2);
  Prefilled result{Mask(problem, policy.get()), {}};
  fp_block_mask counts = result.mask.view;
  counts.bits = nullptr;
  counts.vertical_slash = nullptr;
  size_t bytes = 0;
  ExpectOk(fp_prefill_workspace(&problem, policy.get(), &run.exec, &bytes), "fp_prefill_workspace");
  Scratch scratch(bytes);
  OutputMemory memory(problem, Strides::kContiguous);
  ExpectOk(fp_prefill(&problem, policy.get(), &run.exec, &counts, &memory.output, scratch.data(), bytes), "fp_prefill");
  result.attended = memory.Gather();
  return result;
}

GuardResults::GuardResults(const fp_problem& problem, const fp_guard& s, std::vector<float> l)
    : settings(s), levels(std::move(l)) {
  const size_t heads = static_cast<size_t>(problem.batch) * static_cast<size_t>(problem.q_heads);
  for (std::vector<float>* values : {&recall, &low, &p05}) values->assign(heads, -99);
  for (std::vector<int32_t>* values : {&rows, &missed_block, &outcome}) values->assign(heads, -99);
  certificate.assign(static_cast<size_t>(problem.batch), -99);
}

fp_guard GuardResults::View() {
  fp_guard g = settings;
  g.recall = recall.data();
  g.recall_low = low.data();
  g.recall_p05 = p05.data();
  g.rows_audited = rows.data();
  g.missed_block = missed_block.data();
  g.outcome = outcome.data();
  g.certificate = certificate.data();
  g.levels = levels.empty() ? nullptr : levels.data();
  return g;
}

fp_guard GuardOf(int32_t mode, int32_t rows, float target, uint64_t seed) {
  fp_guard guard;
  fp_guard_init(&guard);
  guard.mode = mode;
  guard.rows = rows;
  guard.target = target;
  guard.seed = seed;
  return guard;
}

GuardResults Audit(const Engine& engine, const fp_problem& problem, Mask& mask, const fp_guard& settings, int threads) {
  Execution run(engine, threads);
  GuardResults results(problem, settings);
  fp_guard guard = results.View();
  run.exec.guard = &guard;
  size_t bytes = 0;
  ExpectOk(fp_audit_workspace(&problem, &mask.view, &run.exec, &bytes), "fp_audit_workspace");
  Scratch scratch(bytes);
  ExpectOk(fp_audit(&problem, &mask.view, &run.exec, scratch.data(), bytes), "fp_audit");
  return results;
}

Guarded PrefillGuarded(const Engine& engine, const fp_problem& problem, const AnyPolicy& policy,
                       const fp_guard& settings, std::vector<float> levels, int threads) {
  Execution run(engine, threads);
  Guarded result{{Mask(problem, policy.get()), {}}, GuardResults(problem, settings, std::move(levels))};
  fp_guard guard = result.guard.View();
  run.exec.guard = &guard;
  size_t bytes = 0;
  ExpectOk(fp_prefill_workspace(&problem, policy.get(), &run.exec, &bytes), "fp_prefill_workspace");
  Scratch scratch(bytes);
  OutputMemory memory(problem, Strides::kContiguous);
  ExpectOk(
      fp_prefill(&problem, policy.get(), &run.exec, &result.prefilled.mask.view, &memory.output, scratch.data(), bytes),
      "fp_prefill");
  result.prefilled.attended = memory.Gather();
  return result;
}

int64_t LogicalRow(const fp_problem& problem, const Sequence& s, int64_t i, int64_t h) {
  return (s.q_begin + i) * problem.q_heads + h;
}

} // namespace flashprefill::test
