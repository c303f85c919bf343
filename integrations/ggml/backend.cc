// The plugin as ggml sees it: a registry of one device of type ACCEL, whose backend computes the attention of prompts
// and works in the CPU's memory. llama.cpp makes one backend for each context and hands it no parameters, so options
// come from a file: `flashprefill.conf` beside this library, or the one that FLASHPREFILL_GGML_CONFIG names. Programs
// may give them to ggml_backend_dev_init, or call what ggml_backend_reg_get_proc_address returns for
//   "flashprefill_set_options"  const char* (const char* text): for contexts made from now on; NULL, or what is wrong
//   "flashprefill_stats"        size_t (char* text, size_t size): JSON of all that was done since the last reset, like
//   snprintf "flashprefill_reset_stats"  void (void)
#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "ggml-backend-impl.h"

namespace flashprefill::ggml {
namespace {

// ---------------------------------------------------------------- what contexts share

std::mutex g_mutex; // of the next three
Options g_options;
Stats g_stats;
std::set<std::string> g_said; // warnings, since the newest context was made
// The largest micro-batch that an engine has asked about since the newest context was made: it reserves memory for a
// full one before it computes any.
std::atomic<int64_t> g_full_batch{0};

// Of a context that is being made.
Options NewOptions() {
  const std::lock_guard lock(g_mutex);
  g_said.clear();
  g_full_batch = 0;
  return g_options;
}

Options CurrentOptions() {
  const std::lock_guard lock(g_mutex);
  return g_options;
}

std::string Line(const Stats& s) {
  char line[256];
  const int64_t rows = s.sparse_rows + s.dense_rows + s.stock_rows;
  std::snprintf(line, sizeof(line),
                "%lld rows in %lld nodes: sparse %lld, dense %lld, left to the CPU backend %lld; density %.3f; select "
                "%.3f s, attend %.3f s",
                static_cast<long long>(rows), static_cast<long long>(s.nodes), static_cast<long long>(s.sparse_rows),
                static_cast<long long>(s.dense_rows), static_cast<long long>(s.stock_rows), s.density(),
                s.select_seconds, s.attend_seconds);
  return s.found.any() ? line + ("; " + s.found.Line()) : line;
}

size_t StatsText(char* text, size_t size) {
  const std::lock_guard lock(g_mutex);
  const Stats& s = g_stats;
  const std::string found = s.found.any() ? s.found.Json() : "null";
  return std::snprintf(
      text, size,
      "{\"nodes\": %lld, \"sparse_rows\": %lld, \"dense_rows\": %lld, \"stock_rows\": %lld, "
      "\"gathered_rows\": %lld, \"kept_blocks\": %lld, \"total_blocks\": %lld, \"density\": %.6f, "
      "\"select_seconds\": %.6f, \"attend_seconds\": %.6f, \"guard_seconds\": %.6f, \"guard\": %s}",
      static_cast<long long>(s.nodes), static_cast<long long>(s.sparse_rows), static_cast<long long>(s.dense_rows),
      static_cast<long long>(s.stock_rows), static_cast<long long>(s.gathered_rows), static_cast<long long>(s.kept),
      static_cast<long long>(s.total), s.density(), s.select_seconds, s.attend_seconds, s.guard_seconds, found.c_str());
}

void ResetStats() {
  const std::lock_guard lock(g_mutex);
  g_stats = {};
}

const char* SetOptions(const char* text) try {
  const std::lock_guard lock(g_mutex);
  g_options.Apply(text, "flashprefill_set_options");
  return nullptr;
} catch (const std::invalid_argument& error) {
  thread_local std::string message;
  message = error.what();
  return message.c_str();
}

// ---------------------------------------------------------------- backend

struct Context {
  explicit Context(const Options& o) : options(o), attention(o) {}

  const Options options;
  Attention attention;
  Stats sum, batch;   // of this context, and of its current micro-batch
  int64_t layer = -1; // of the last node: where they begin again, so does a micro-batch
};

Context& Of(ggml_backend_t backend) { return *static_cast<Context*>(backend->context); }

void EndBatch(Context& context) {
  if (context.batch.nodes == 0) return;
  if (context.options.log) Log(GGML_LOG_LEVEL_INFO, "micro-batch: " + Line(context.batch));
  context.sum.Add(context.batch);
  context.batch = {};
}

const char* BackendName(ggml_backend_t) { return "FlashPrefill"; }

void FreeBackend(ggml_backend_t backend) {
  EndBatch(Of(backend));
  Log(GGML_LOG_LEVEL_INFO, Of(backend).sum.nodes > 0 ? Line(Of(backend).sum)
                                                     : "nothing was computed: prompts were short, flash attention was "
                                                       "off, or the model has none that the plugin knows");
  delete &Of(backend);
  delete backend;
}

ggml_status ComputeGraph(ggml_backend_t backend, ggml_cgraph* graph) {
  Context& context = Of(backend);
  for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
    ggml_tensor* node = ggml_graph_node(graph, i);
    if (node->op != GGML_OP_FLASH_ATTN_EXT || ggml_is_empty(node)) continue; // views come along with their source
    const int64_t layer = LayerOf(node);
    if (layer <= context.layer) EndBatch(context);
    context.layer = layer;
    Stats stats;
    const ggml_status status = context.attention.Compute(node, g_full_batch.load(), stats);
    if (status != GGML_STATUS_SUCCESS) return status;
    context.batch.Add(stats);
    const std::lock_guard lock(g_mutex);
    g_stats.Add(stats);
  }
  return GGML_STATUS_SUCCESS;
}

void SetThreads(ggml_backend_t backend, int threads) { Of(backend).attention.set_threads(threads); }

ggml_guid g_guid = {0x5c, 0x2f, 0x91, 0xd7, 0x0b, 0x6e, 0x4a, 0x38, 0xa4, 0x13, 0xf2, 0x7d, 0x60, 0xc9, 0x8e, 0x45};

// ---------------------------------------------------------------- device

const char* DeviceName(ggml_backend_dev_t) { return "FlashPrefill"; }

const char* DeviceDescription(ggml_backend_dev_t) { return "sparse attention for prompts, on the CPU"; }

void DeviceMemory(ggml_backend_dev_t, size_t* free, size_t* total) { *free = *total = 0; }

enum ggml_backend_dev_type DeviceType(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; }

void DeviceProps(ggml_backend_dev_t device, ggml_backend_dev_props* props) {
  *props = {};
  props->name = DeviceName(device);
  props->description = DeviceDescription(device);
  props->type = DeviceType(device);
  props->caps.buffer_from_host_ptr = true;
}

ggml_backend_t InitBackend(ggml_backend_dev_t device, const char* params) try {
  Options options = NewOptions();
  if (params) options.Apply(params, "the backend's parameters");
  Log(GGML_LOG_LEVEL_INFO, options.Describe());
  ggml_backend_i functions{};
  functions.get_name = BackendName;
  functions.free = FreeBackend;
  functions.graph_compute = ComputeGraph;
  return new ggml_backend{&g_guid, functions, device, new Context(options)};
} catch (const std::invalid_argument& error) {
  Log(GGML_LOG_LEVEL_ERROR, error.what());
  return nullptr;
}

ggml_backend_buffer_type_t BufferType(ggml_backend_dev_t) { return ggml_backend_cpu_buffer_type(); }

ggml_backend_buffer_t BufferFromPointer(ggml_backend_dev_t, void* pointer, size_t size, size_t) {
  return ggml_backend_cpu_buffer_from_ptr(pointer, size);
}

void WarnOnce(const std::string& line) {
  const std::lock_guard lock(g_mutex);
  if (g_said.insert(line).second) Log(GGML_LOG_LEVEL_WARN, line);
}

bool SupportsOp(ggml_backend_dev_t, const ggml_tensor* node) {
  KeepWrittenCells(node);
  // Attention over a mask, of a prompt, by other nodes than ours.
  if (node->op == GGML_OP_SOFT_MAX && node->src[1] && node->src[0]->ne[1] >= CurrentOptions().min_rows) {
    WarnOnce(
        "flash attention is off, so the plugin computes nothing: turn it on (-fa on). With auto, llama.cpp turns "
        "it off where layers are put on this device (--device with -ngl)");
  }
  if (node->op != GGML_OP_FLASH_ATTN_EXT) return false;
  const int64_t rows = node->src[0]->ne[1] * node->src[0]->ne[3];
  for (int64_t most = g_full_batch.load(); rows > most && !g_full_batch.compare_exchange_weak(most, rows);) {
  }
  const Options options = CurrentOptions();
  // The engine asks about a full micro-batch before it reads any prompt, so this is said at its start.
  if (const char* reason = WhyDense(node); reason && node->src[0]->ne[1] >= options.min_rows) {
    WarnOnce(std::string("layers with ") + reason + " stay the CPU backend's, dense");
  }
  return Supports(node, options);
}

bool SupportsBuffer(ggml_backend_dev_t, ggml_backend_buffer_type_t type) { return ggml_backend_buft_is_host(type); }

// ---------------------------------------------------------------- registry

const char* RegName(ggml_backend_reg_t) { return "FlashPrefill"; }

size_t DeviceCount(ggml_backend_reg_t) { return 1; }

ggml_backend_dev_t GetDevice(ggml_backend_reg_t reg, size_t) {
  static ggml_backend_device device = [&] {
    ggml_backend_device d{};
    d.iface.get_name = DeviceName;
    d.iface.get_description = DeviceDescription;
    d.iface.get_memory = DeviceMemory;
    d.iface.get_type = DeviceType;
    d.iface.get_props = DeviceProps;
    d.iface.init_backend = InitBackend;
    d.iface.get_buffer_type = BufferType;
    d.iface.buffer_from_host_ptr = BufferFromPointer;
    d.iface.supports_op = SupportsOp;
    d.iface.supports_buft = SupportsBuffer;
    d.reg = reg;
    return d;
  }();
  return &device;
}

void* ProcAddress(ggml_backend_reg_t, const char* name) {
  const std::string asked = name;
  if (asked == "ggml_backend_set_n_threads") return reinterpret_cast<void*>(SetThreads);
  if (asked == "flashprefill_set_options") return reinterpret_cast<void*>(SetOptions);
  if (asked == "flashprefill_stats") return reinterpret_cast<void*>(StatsText);
  if (asked == "flashprefill_reset_stats") return reinterpret_cast<void*>(ResetStats);
  return nullptr;
}

// ggml refuses another version of the backend interface. Versions of ggml that have the same one may still number
// their operators differently or lay out tensors in another way; a plugin built for those would compute nonsense.
void CheckGgml() {
  constexpr size_t kObject = 32; // ggml's own head of every tensor; not in a header
  const std::string op = ggml_op_name(GGML_OP_FLASH_ATTN_EXT);
  if (op != "FLASH_ATTN_EXT" || ggml_tensor_overhead() != kObject + GGML_TENSOR_SIZE ||
      std::strcmp(ggml_type_name(GGML_TYPE_BF16), "bf16") != 0) {
    throw std::invalid_argument(std::string("built for another ggml than this one (") + ggml_version() +
                                "): build the plugin against the llama.cpp that loads it");
  }
}

// The defaults, then flashprefill.conf beside this library if it is there, then the file that the environment names.
Options OptionsFromFiles() {
  Options options;
  Dl_info self;
  if (dladdr(reinterpret_cast<void*>(&SetThreads), &self) && self.dli_fname) {
    const std::string path = self.dli_fname;
    const std::string beside = path.substr(0, path.rfind('/') + 1) + "flashprefill.conf";
    if (std::ifstream(beside)) options.ApplyFile(beside);
  }
  if (const char* named = std::getenv("FLASHPREFILL_GGML_CONFIG")) options.ApplyFile(named);
  return options;
}

ggml_backend_reg_t Register() try {
  CheckGgml();
  g_options = OptionsFromFiles();
  static ggml_backend_reg reg = [] {
    ggml_backend_reg r{};
    r.api_version = GGML_BACKEND_API_VERSION;
    r.iface.get_name = RegName;
    r.iface.get_device_count = DeviceCount;
    r.iface.get_device = GetDevice;
    r.iface.get_proc_address = ProcAddress;
    return r;
  }();
  char cpu[256];
  fp_backend_describe("cpu", cpu, sizeof(cpu));
  Log(GGML_LOG_LEVEL_INFO, std::string("version ") + fp_version() + ", " + cpu);
  return &reg;
} catch (const std::invalid_argument& error) {
  Log(GGML_LOG_LEVEL_ERROR, std::string(error.what()) + "; attention stays the CPU backend's");
  return nullptr;
}

} // namespace
} // namespace flashprefill::ggml

GGML_BACKEND_DL_IMPL(flashprefill::ggml::Register)
