// Micro-batches are chunks of prompts: the n rows of a run see L keys, and stand at positions L - n .. L - 1.
// flashprefill takes the KV cache where it lies. Cells in one piece are a tensor with strides; scattered ones are pages
// of one key, listed in a block table. Quantised K and V are first converted, a run's cells in order, by ggml's own
// functions.
#include "attention.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace flashprefill::ggml {
namespace {

float Parameter(const ggml_tensor* node, int index) {
  float value;
  std::memcpy(&value, reinterpret_cast<const float*>(node->op_params) + index, sizeof(value));
  return value;
}
float Scale(const ggml_tensor* node) { return Parameter(node, 0); }
float AlibiBias(const ggml_tensor* node) { return Parameter(node, 1); }
float Softcap(const ggml_tensor* node) { return Parameter(node, 2); }

// The dtype in which flashprefill reads a tensor of this type as it is; -1: it must be converted.
int32_t DtypeOf(ggml_type type) {
  switch (type) {
    case GGML_TYPE_F32:
      return FP_F32;
    case GGML_TYPE_F16:
      return FP_F16;
    case GGML_TYPE_BF16:
      return FP_BF16;
    default:
      return -1;
  }
}

// K or V: rows of whole elements, or of a type that ggml converts.
bool Readable(const ggml_tensor* t) {
  if (t->nb[0] != ggml_type_size(t->type)) return false;
  if (DtypeOf(t->type) < 0) return ggml_get_type_traits(t->type)->to_float != nullptr;
  return t->nb[1] % t->nb[0] == 0 && t->nb[2] % t->nb[0] == 0;
}

} // namespace

void Stats::Add(const Stats& other) {
  nodes += other.nodes;
  sparse_rows += other.sparse_rows;
  dense_rows += other.dense_rows;
  stock_rows += other.stock_rows;
  gathered_rows += other.gathered_rows;
  kept += other.kept;
  total += other.total;
  select_seconds += other.select_seconds;
  attend_seconds += other.attend_seconds;
  guard_seconds += other.guard_seconds;
  found.Add(other.found);
}

void Log(ggml_log_level level, const std::string& line) {
  ggml_log_callback callback;
  void* user_data;
  ggml_log_get(&callback, &user_data);
  callback(level, ("flashprefill: " + line + "\n").c_str(), user_data);
}

const char* WhyDense(const ggml_tensor* node) {
  const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3];
  if (!mask) return "attention without a mask";
  if (node->src[4]) return "attention sinks";
  if (AlibiBias(node) != 0) return "ALiBi";
  if (Softcap(node) != 0) return "logit softcapping";
  if (!(Scale(node) > 0)) return "a scale that is not positive";
  if (k->ne[0] != q->ne[0] || v->ne[0] != q->ne[0]) return "values of another head_dim than the keys'";
  if (q->ne[0] > 512) return "a head_dim above 512";
  if (q->type != GGML_TYPE_F32 || node->type != GGML_TYPE_F32 || mask->type != GGML_TYPE_F16) return "other types";
  if (v->ne[2] != k->ne[2] || q->ne[2] % k->ne[2] != 0) return "heads that are not grouped";
  if (k->ne[3] != q->ne[3] || v->ne[3] != q->ne[3] || k->ne[1] > INT32_MAX) return "other shapes";
  if (mask->ne[0] != k->ne[1] || mask->ne[1] < q->ne[1] || mask->ne[2] != 1) return "a mask of another shape";
  if (mask->ne[3] != q->ne[3] && mask->ne[3] != 1) return "a mask of another shape";
  const bool float_rows = q->nb[0] == sizeof(float) && q->nb[1] % sizeof(float) == 0 && q->nb[2] % sizeof(float) == 0;
  if (!float_rows || !ggml_is_contiguous(node) || !ggml_is_contiguous(mask) || !Readable(k) || !Readable(v))
    return "tensors that lie in another way";
  return nullptr;
}

bool Supports(const ggml_tensor* node, const Options& options) {
  if (node->op != GGML_OP_FLASH_ATTN_EXT) return false;
  if (node->src[0]->ne[1] < options.min_rows || node->src[1]->ne[1] < options.min_keys || WhyDense(node)) return false;
  const auto& dense = options.dense_layers;
  return std::find(dense.begin(), dense.end(), LayerOf(node)) == dense.end();
}

void* Attention::Buffer::Reserve(size_t wanted) {
  if (wanted > bytes) {
    constexpr size_t kLine = 64;
    bytes = (wanted + kLine - 1) / kLine * kLine;
    data.reset(std::aligned_alloc(kLine, bytes));
    if (!data) throw std::bad_alloc();
  }
  return data.get();
}

Attention::~Attention() {
  if (cpu_) ggml_backend_free(cpu_);
}

ggml_status Attention::Compute(ggml_tensor* node, int64_t full_batch, Stats& stats) try {
  const ggml_tensor* q = node->src[0];
  const int64_t rows = q->ne[1], streams = q->ne[3];
  const fp_policy& policy = options_.policy();
  const int64_t sink_keys = int64_t{policy.sink_blocks} * policy.block_size;
  // Engines fill a batch with one sequence after the other. So a run that ends before its micro-batch does, or in one
  // that is not full, ends its prompt. Streams share a micro-batch equally; what is left over is less than a row each.
  const bool full = rows * streams + streams - 1 >= full_batch;
  std::vector<Rows> stock;
  const auto leave = [&](int64_t stream, int64_t first, int64_t count) {
    stock.push_back({stream, first, count});
    stats.stock_rows += count;
  };
  // The scheduler asks the device, whose options are those of the latest context; this one's may leave more.
  const auto* runs = Supports(node, options_) ? &reading_.Runs(node, options_.min_rows, sink_keys, threads_) : nullptr;
  for (int64_t stream = 0; stream < streams; ++stream) {
    if (!runs) {
      leave(stream, 0, rows);
      continue;
    }
    for (const Run& run : (*runs)[stream]) {
      const bool ends = !full || run.first + run.rows < rows;
      const bool final_chunk =
          options_.final_chunk == FinalChunk::kAlways || (options_.final_chunk == FinalChunk::kShort && ends);
      if (!run.causal() || !ComputeRun(node, stream, run, final_chunk, stats)) leave(stream, run.first, run.rows);
    }
  }
  ++stats.nodes;
  return stock.empty() ? GGML_STATUS_SUCCESS : ComputeStock(node, stock);
} catch (const std::bad_alloc&) {
  Log(GGML_LOG_LEVEL_ERROR, "out of memory");
  return GGML_STATUS_ALLOC_FAILED;
}

// K or V of a run: a view of the cache, or of `converted`.
void Attention::SetKeys(const ggml_tensor* tensor, int64_t stream, const Run& run, Buffer& converted, fp_problem& p,
                        fp_tensor& to) {
  const int64_t heads = tensor->ne[2], head_dim = tensor->ne[0];
  char* base = static_cast<char*>(tensor->data) + stream * tensor->nb[3];
  to.dtype = DtypeOf(tensor->type);
  to.stride[3] = 1;
  if (to.dtype >= 0) {
    const int64_t element = static_cast<int64_t>(tensor->nb[0]);
    const int64_t cell = static_cast<int64_t>(tensor->nb[1]) / element;
    to.data = p.block_table ? base : base + run.cells[0] * tensor->nb[1];
    to.stride[0] = to.stride[1] = cell;
    to.stride[2] = static_cast<int64_t>(tensor->nb[2]) / element;
    return;
  }
  // With a block table the conversion keeps the cells' places, so that K and V may be of different types.
  const auto to_float = ggml_get_type_traits(tensor->type)->to_float;
  const int64_t count = static_cast<int64_t>(run.cells.size());
  const int64_t places = p.block_table ? tensor->ne[1] : count;
  float* rows = static_cast<float*>(converted.Reserve(places * heads * head_dim * sizeof(float)));
#pragma omp parallel for num_threads(threads_) schedule(static)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t cell = run.cells[i], place = p.block_table ? cell : i;
    for (int64_t h = 0; h < heads; ++h) {
      to_float(base + cell * tensor->nb[1] + h * tensor->nb[2], rows + (place * heads + h) * head_dim, head_dim);
    }
  }
  to.data = rows;
  to.dtype = FP_F32;
  to.stride[0] = to.stride[1] = heads * head_dim;
  to.stride[2] = head_dim;
}

// False, after a warning, if flashprefill refuses: then nothing has been written.
bool Attention::ComputeRun(ggml_tensor* node, int64_t stream, const Run& run, bool final_chunk, Stats& stats) {
  const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2];
  const fp_policy& policy = options_.policy();
  const int32_t keys = static_cast<int32_t>(run.cells.size());
  const bool gathered = !run.contiguous();

  fp_problem p;
  fp_problem_init(&p);
  p.batch = 1;
  p.q_heads = static_cast<int32_t>(q->ne[2]);
  p.kv_heads = static_cast<int32_t>(k->ne[2]);
  p.head_dim = static_cast<int32_t>(q->ne[0]);
  p.final_chunk = final_chunk;
  p.softmax_scale = Scale(node);
  p.total_q = p.max_seqlen_q = run.rows;
  p.max_seqlen_k = keys;
  if (gathered) {
    p.block_table = run.cells.data();
    p.block_table_stride = p.pages_per_seq = keys;
    p.page_size = 1;
    p.page_count = k->ne[1];
    p.seqused_k = &keys;
  }
  const auto floats = [](size_t bytes) { return static_cast<int64_t>(bytes / sizeof(float)); };
  p.q = {static_cast<char*>(q->data) + stream * q->nb[3] + run.first * q->nb[1],
         FP_F32,
         0,
         {0, floats(q->nb[1]), floats(q->nb[2]), 1}};
  SetKeys(k, stream, run, k_, p, p.k);
  SetKeys(v, stream, run, v_, p, p.v);
  fp_output output;
  fp_output_init(&output);
  output.out = {static_cast<char*>(node->data) + stream * node->nb[3] + run.first * node->nb[2],
                FP_F32,
                0,
                {0, floats(node->nb[2]), floats(node->nb[1]), 1}};

  fp_timings timings{};
  fp_exec exec;
  fp_exec_init(&exec);
  exec.threads = threads_;
  exec.timings = &timings;
  fp_guard guard;
  if (options_.guard >= 0) {
    fp_guard_init(&guard);
    guard.mode = options_.guard;
    guard.target = options_.guard_target;
    guard.layer = static_cast<int32_t>(std::max<int64_t>(0, LayerOf(node)));
    findings_.Offer(p.q_heads, guard);
    exec.guard = &guard;
  }

  auto prefill = [&]() -> fp_status {
    fp_block_mask mask;
    fp_block_mask_init(&mask);
    if (fp_status s = fp_mask_describe(&p, &policy, &mask); s != FP_OK) return s;
    const int64_t tiles = mask.heads * mask.tile_rows;
    int32_t fallback = FP_SELECTED;
    mask.bits = static_cast<uint64_t*>(bits_.Reserve(tiles * mask.words * sizeof(uint64_t)));
    mask.counts = static_cast<int32_t*>(counts_.Reserve(tiles * sizeof(int32_t)));
    mask.fallback = &fallback;
    const int64_t lines = int64_t{mask.max_verticals} + mask.max_slashes;
    if (lines > 0) {
      mask.vertical_slash = static_cast<int32_t*>(lines_.Reserve(mask.heads * (2 + lines) * sizeof(int32_t)));
    }
    if (mask.max_keys > 0) {
      const int64_t list = 2 + int64_t{mask.max_keys};
      mask.key_lists = static_cast<int32_t*>(lists_.Reserve(mask.heads * mask.segment_rows * list * sizeof(int32_t)));
    }
    size_t bytes = 0;
    if (fp_status s = fp_prefill_workspace(&p, &policy, &exec, &bytes); s != FP_OK) return s;
    void* workspace = workspace_.Reserve(bytes);
    if (fp_status s = fp_prefill(&p, &policy, &exec, &mask, &output, workspace, bytes); s != FP_OK) return s;

    int64_t total = 0;
    int64_t* kept = static_cast<int64_t*>(kept_.Reserve(mask.heads * sizeof(int64_t)));
    fp_stats of_mask;
    fp_stats_init(&of_mask);
    of_mask.kept = kept;
    of_mask.total = &total;
    if (fp_status s = fp_mask_stats(&p, &mask, &of_mask); s != FP_OK) return s;
    for (int32_t h = 0; h < mask.heads; ++h) stats.kept += kept[h];
    stats.total += total * mask.heads;
    (fallback == FP_SELECTED ? stats.sparse_rows : stats.dense_rows) += run.rows;
    if (gathered) stats.gathered_rows += run.rows;
    stats.select_seconds += timings.select_seconds;
    stats.attend_seconds += timings.attend_seconds;
    stats.guard_seconds += timings.guard_seconds;
    if (exec.guard) stats.found.Add(findings_.Sum());
    return FP_OK;
  };
  if (prefill() == FP_OK) return true;
  if (warned_ != fp_last_error()) {
    warned_ = fp_last_error();
    Log(GGML_LOG_LEVEL_WARN, "left to the CPU backend, because " + warned_);
  }
  return false;
}

// The CPU backend's kernel on some rows of the node: nodes of a graph of its own, whose tensors point into ours.
ggml_status Attention::ComputeStock(ggml_tensor* node, const std::vector<Rows>& rows) {
  if (!cpu_) cpu_ = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
  if (!cpu_) return GGML_STATUS_FAILED;
  ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu_));
  if (auto set = reinterpret_cast<ggml_backend_set_n_threads_t>(
          ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"))) {
    set(cpu_, threads_);
  }

  constexpr size_t kTensorsEach = 5; // q, k, v, mask and the node
  const size_t bytes =
      rows.size() * kTensorsEach * ggml_tensor_overhead() + ggml_graph_overhead_custom(rows.size() + 1, false);
  const std::unique_ptr<ggml_context, decltype(&ggml_free)> context(ggml_init({bytes, nullptr, true}), &ggml_free);
  if (!context) return GGML_STATUS_ALLOC_FAILED;
  ggml_cgraph* graph = ggml_new_graph_custom(context.get(), rows.size() + 1, false);
  // Index `first` and `count` of the axis that holds query rows, of one stream.
  const auto part = [&](const ggml_tensor* of, int axis, int64_t first, int64_t count, int64_t stream) {
    ggml_tensor* t = ggml_new_tensor_1d(context.get(), of->type, 1);
    *t = *of;
    t->data = static_cast<char*>(of->data) + (of->ne[3] == 1 ? 0 : stream * of->nb[3]) + first * of->nb[axis];
    t->ne[axis] = count;
    t->ne[3] = 1;
    return t;
  };
  for (const Rows& r : rows) {
    ggml_tensor* t = part(node, 2, r.first, r.count, r.stream);
    t->src[0] = part(node->src[0], 1, r.first, r.count, r.stream);
    t->src[1] = part(node->src[1], 1, 0, node->src[1]->ne[1], r.stream);
    t->src[2] = part(node->src[2], 1, 0, node->src[2]->ne[1], r.stream);
    t->src[3] = part(node->src[3], 1, r.first, r.count, r.stream);
    ggml_graph_add_node(graph, t);
  }
  return ggml_backend_graph_compute(cpu_, graph);
}

} // namespace flashprefill::ggml
