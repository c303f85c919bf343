// The plugin beside the CPU backend, operator by operator: one FLASH_ATTN_EXT node of random q, k and v under every
// kind of mask, computed by both and compared with double arithmetic. With every block kept the plugin may be off no
// more than fp32's rounding allows, and never more than the CPU backend is.
//
// Run as: node_test <libggml-flashprefill.so>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

namespace {

ggml_backend_reg_t g_reg;

using MaskMaker = std::function<void(int64_t stream, std::vector<float>& mask)>; // [rows][cells], all hidden at first

struct Case {
  std::string name;
  int64_t head_dim, heads, kv_heads, rows, cells, streams;
  ggml_type k_type, v_type;
  MaskMaker mask;
  bool ours = true;   // all rows are flashprefill's; false: some or all are left to the CPU backend
  double allowed = 0; // error where not all are ours, beyond the CPU backend's own
};

void See(std::vector<float>& mask, int64_t cells, int64_t row, int64_t cell) { mask[row * cells + cell] = 0; }

// Rows [first, first + count) end a sequence that holds these cells in this order.
void Causal(std::vector<float>& mask, int64_t cells, int64_t first, int64_t count, const std::vector<int64_t>& order) {
  for (int64_t r = 0; r < count; ++r) {
    for (size_t i = 0; i + (count - 1 - r) < order.size(); ++i) See(mask, cells, first + r, order[i]);
  }
}

std::vector<int64_t> Range(int64_t begin, int64_t end) {
  std::vector<int64_t> v(end - begin);
  std::iota(v.begin(), v.end(), begin);
  return v;
}

std::string StatsText() {
  const auto stats =
      reinterpret_cast<size_t (*)(char*, size_t)>(ggml_backend_reg_get_proc_address(g_reg, "flashprefill_stats"));
  char text[1024];
  stats(text, sizeof(text));
  return text;
}

int64_t Stat(const std::string& name) {
  const std::string text = StatsText();
  return std::strtoll(text.c_str() + text.find("\"" + name + "\": ") + name.size() + 4, nullptr, 10);
}

void ResetStats() {
  reinterpret_cast<void (*)()>(ggml_backend_reg_get_proc_address(g_reg, "flashprefill_reset_stats"))();
}

struct Graph {
  std::unique_ptr<ggml_context, decltype(&ggml_free)> context{nullptr, &ggml_free};
  std::unique_ptr<ggml_backend_buffer, decltype(&ggml_backend_buffer_free)> buffer{nullptr, &ggml_backend_buffer_free};
  ggml_tensor *q, *k, *v, *mask, *out;
  ggml_cgraph* graph;
};

// As llama.cpp builds it: q, k and v are views of [head_dim, heads, tokens].
Graph Make(const Case& c, ggml_backend_t cpu, float scale) {
  Graph g;
  g.context.reset(ggml_init({64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true}));
  ggml_context* x = g.context.get();
  ggml_tensor* q = ggml_new_tensor_4d(x, GGML_TYPE_F32, c.head_dim, c.heads, c.rows, c.streams);
  ggml_tensor* k = ggml_new_tensor_4d(x, c.k_type, c.head_dim, c.kv_heads, c.cells, c.streams);
  ggml_tensor* v = ggml_new_tensor_4d(x, c.v_type, c.head_dim, c.kv_heads, c.cells, c.streams);
  g.mask = ggml_new_tensor_4d(x, GGML_TYPE_F16, c.cells, c.rows, 1, c.streams);
  g.q = q, g.k = k, g.v = v;
  g.out = ggml_flash_attn_ext(x, ggml_permute(x, q, 0, 2, 1, 3), ggml_permute(x, k, 0, 2, 1, 3),
                              ggml_permute(x, v, 0, 2, 1, 3), g.mask, scale, 0, 0);
  g.graph = ggml_new_graph(x);
  ggml_build_forward_expand(g.graph, g.out);
  g.buffer.reset(ggml_backend_alloc_ctx_tensors(x, cpu));
  return g;
}

// Random values, written in the tensor's type. Returns what the tensor then holds.
std::vector<float> Fill(ggml_tensor* t, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(ggml_nelements(t));
  for (float& x : values) x = normal(random);
  std::vector<char> raw(ggml_nbytes(t));
  if (t->type == GGML_TYPE_F32) {
    std::memcpy(raw.data(), values.data(), raw.size());
  } else {
    ggml_quantize_chunk(t->type, values.data(), raw.data(), 0, ggml_nrows(t), t->ne[0], nullptr);
    ggml_get_type_traits(t->type)->to_float(raw.data(), values.data(), ggml_nelements(t));
  }
  ggml_backend_tensor_set(t, raw.data(), 0, raw.size());
  return values;
}

std::vector<double> Reference(const Case& c, const std::vector<float>& q, const std::vector<float>& k,
                              const std::vector<float>& v, const std::vector<float>& mask, double scale) {
  std::vector<double> out(q.size());
  std::vector<double> p(c.cells);
  for (int64_t s = 0; s < c.streams; ++s) {
    for (int64_t r = 0; r < c.rows; ++r) {
      for (int64_t h = 0; h < c.heads; ++h) {
        const int64_t kv = h / (c.heads / c.kv_heads);
        const float* query = &q[((s * c.rows + r) * c.heads + h) * c.head_dim];
        double largest = -INFINITY, sum = 0;
        for (int64_t j = 0; j < c.cells; ++j) {
          const float* key = &k[((s * c.cells + j) * c.kv_heads + kv) * c.head_dim];
          p[j] = scale * std::inner_product(query, query + c.head_dim, key, 0.0) + mask[(s * c.rows + r) * c.cells + j];
          largest = std::max(largest, p[j]);
        }
        if (largest == -INFINITY) continue;
        double* to = &out[((s * c.rows + r) * c.heads + h) * c.head_dim];
        for (int64_t j = 0; j < c.cells; ++j) {
          const double weight = std::exp(p[j] - largest);
          const float* value = &v[((s * c.cells + j) * c.kv_heads + kv) * c.head_dim];
          sum += weight;
          for (int64_t d = 0; d < c.head_dim; ++d) to[d] += weight * value[d];
        }
        for (int64_t d = 0; d < c.head_dim; ++d) to[d] /= sum;
      }
    }
  }
  return out;
}

double Worst(const std::vector<float>& is, const std::vector<double>& must_be) {
  double worst = 0;
  for (size_t i = 0; i < is.size(); ++i) {
    const double off = std::abs(is[i] - must_be[i]);
    worst = std::isnan(off) ? INFINITY : std::max(worst, off);
  }
  return worst;
}

std::vector<float> Compute(ggml_backend_t backend, const Graph& g) {
  std::vector<float> out(ggml_nelements(g.out), NAN);
  ggml_backend_tensor_set(g.out, out.data(), 0, ggml_nbytes(g.out));
  EXPECT_EQ(ggml_backend_graph_compute(backend, g.graph), GGML_STATUS_SUCCESS);
  ggml_backend_tensor_get(g.out, out.data(), 0, ggml_nbytes(g.out));
  return out;
}

class Node : public testing::TestWithParam<Case> {};

TEST_P(Node, EqualsTheCpuBackend) {
  const Case& c = GetParam();
  using Backend = std::unique_ptr<ggml_backend, decltype(&ggml_backend_free)>;
  const Backend cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr), &ggml_backend_free);
  const Backend ours(ggml_backend_init_by_name("FlashPrefill", "policy=dense, min_rows=16"), &ggml_backend_free);
  ASSERT_TRUE(cpu && ours);
  const float scale = 0.7f / std::sqrt(static_cast<float>(c.head_dim));
  const Graph g = Make(c, cpu.get(), scale);
  std::mt19937 random(7);
  const auto q = Fill(g.q, random), k = Fill(g.k, random), v = Fill(g.v, random);
  std::vector<float> mask;
  for (int64_t s = 0; s < c.streams; ++s) {
    std::vector<float> one(c.rows * c.cells, -INFINITY);
    c.mask(s, one);
    mask.insert(mask.end(), one.begin(), one.end());
  }
  std::vector<ggml_fp16_t> half(mask.size());
  ggml_fp32_to_fp16_row(mask.data(), half.data(), static_cast<int64_t>(mask.size()));
  ggml_backend_tensor_set(g.mask, half.data(), 0, ggml_nbytes(g.mask));

  const auto must_be = Reference(c, q, k, v, mask, scale);
  const double stock_error = Worst(Compute(cpu.get(), g), must_be);
  ResetStats();
  const double error = Worst(Compute(ours.get(), g), must_be);
  EXPECT_LE(error, c.ours ? 2e-5 : stock_error + c.allowed) << "the CPU backend is off by " << stock_error;
  EXPECT_EQ(Stat("stock_rows") == 0, c.ours) << StatsText();
  EXPECT_EQ(Stat("nodes"), 1);
}

std::vector<Case> Cases() {
  std::vector<Case> all;
  const auto chunk = [](int64_t rows, int64_t cells, int64_t keys) {
    return [=](int64_t, std::vector<float>& mask) { Causal(mask, cells, 0, rows, Range(0, keys)); };
  };
  struct Types {
    ggml_type k, v;
  };
  for (const Types t : {Types{GGML_TYPE_F32, GGML_TYPE_F32}, Types{GGML_TYPE_F16, GGML_TYPE_F16},
                        Types{GGML_TYPE_BF16, GGML_TYPE_BF16}, Types{GGML_TYPE_Q8_0, GGML_TYPE_Q8_0},
                        Types{GGML_TYPE_Q4_0, GGML_TYPE_Q4_0}, Types{GGML_TYPE_Q5_1, GGML_TYPE_F16},
                        Types{GGML_TYPE_F16, GGML_TYPE_Q8_0}, Types{GGML_TYPE_IQ4_NL, GGML_TYPE_BF16}}) {
    const std::string name = std::string(ggml_type_name(t.k)) + "_" + ggml_type_name(t.v);
    all.push_back({"types_" + name, 64, 6, 2, 150, 512, 1, t.k, t.v, chunk(150, 512, 407)});
    all.push_back({"gaps_" + name, 64, 6, 2, 90, 512, 1, t.k, t.v, [](int64_t, std::vector<float>& mask) {
                     std::vector<int64_t> cells = Range(0, 512);
                     std::shuffle(cells.begin(), cells.end(), std::mt19937(3));
                     cells.resize(300);
                     Causal(mask, 512, 0, 90, cells);
                   }});
  }
  for (const int64_t head_dim : {32, 80, 96, 128, 192, 256}) {
    all.push_back({"head_dim_" + std::to_string(head_dim), head_dim, 4, 2, 70, 256, 1, GGML_TYPE_F16, GGML_TYPE_F16,
                   chunk(70, 256, 201)});
  }
  for (const int64_t group : {1, 3, 5, 7, 8}) {
    all.push_back({"group_" + std::to_string(group), 64, group * 2, 2, 129, 512, 1, GGML_TYPE_F16, GGML_TYPE_F16,
                   chunk(129, 512, 511)});
  }
  for (const int64_t rows : {16, 17, 127, 128, 129, 257}) {
    all.push_back({"one_shot_" + std::to_string(rows), 64, 3, 1, rows, 512, 1, GGML_TYPE_F16, GGML_TYPE_F16,
                   chunk(rows, 512, rows)});
  }
  all.push_back(
      {"three_sequences", 64, 6, 2, 130, 512, 1, GGML_TYPE_F16, GGML_TYPE_F16, [](int64_t, std::vector<float>& mask) {
         Causal(mask, 512, 0, 50, Range(0, 140));
         Causal(mask, 512, 50, 60, Range(140, 200));
         Causal(mask, 512, 110, 20, Range(200, 512));
       }});
  all.push_back({"streams_of_unequal_length", 64, 6, 2, 64, 512, 3, GGML_TYPE_F16, GGML_TYPE_F16,
                 [](int64_t s, std::vector<float>& mask) { Causal(mask, 512, 0, 64, Range(0, 64 + 150 * s)); }});
  all.push_back({"streams_quantised", 64, 6, 2, 64, 256, 2, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0,
                 [](int64_t s, std::vector<float>& mask) { Causal(mask, 256, 0, 64, Range(10 * s, 100 + 50 * s)); }});
  all.push_back({"ring", 64, 6, 2, 64, 512, 1, GGML_TYPE_F16, GGML_TYPE_F16, [](int64_t, std::vector<float>& mask) {
                   auto cells = Range(0, 40);
                   for (int64_t c : Range(200, 512)) cells.push_back(c);
                   for (int64_t c : Range(40, 170)) cells.push_back(c);
                   Causal(mask, 512, 0, 64, cells);
                 }});
  // A mask that flashprefill must not touch, or only in part.
  const auto declined = [&](const std::string& name, MaskMaker mask, double allowed = 0) {
    all.push_back({name, 64, 6, 2, 64, 256, 1, GGML_TYPE_F16, GGML_TYPE_F16, std::move(mask), false, allowed});
  };
  declined(
      "decode_rows_beside_a_prompt",
      [](int64_t, std::vector<float>& mask) {
        Causal(mask, 256, 0, 1, Range(0, 30));
        Causal(mask, 256, 1, 1, Range(30, 90));
        Causal(mask, 256, 2, 62, Range(90, 250));
      },
      2e-3); // fewer than 64 rows: the CPU backend then adds up in fp16
  declined("interleaved_sequences", [](int64_t, std::vector<float>& mask) {
    for (int64_t r = 0; r < 64; ++r) Causal(mask, 256, r, 1, r % 2 ? Range(0, 20 + r) : Range(100, 120 + r));
  });
  declined("sliding_window", [](int64_t, std::vector<float>& mask) {
    for (int64_t r = 0; r < 64; ++r) Causal(mask, 256, r, 1, Range(r + 50, r + 150));
  });
  declined("both_ways", [](int64_t, std::vector<float>& mask) { std::fill(mask.begin(), mask.end(), 0.0f); });
  declined("position_bias", [](int64_t, std::vector<float>& mask) {
    for (int64_t r = 0; r < 64; ++r) {
      for (int64_t c = 0; c <= 100 + r; ++c) mask[r * 256 + c] = -0.125f * static_cast<float>(100 + r - c);
    }
  });
  declined("random", [](int64_t, std::vector<float>& mask) {
    std::mt19937 random(5);
    for (float& x : mask) x = random() % 3 ? 0.0f : -INFINITY;
  });
  all.push_back({"streams_that_differ", 64, 6, 2, 64, 256, 3, GGML_TYPE_F16, GGML_TYPE_F16,
                 [](int64_t s, std::vector<float>& mask) {
                   for (int64_t r = 0; r < 64; ++r) {
                     Causal(mask, 256, r, 1, s == 1 ? Range(r + 9, r + 90) : Range(0, 100 + 30 * s + r));
                   }
                 },
                 false});
  declined("rows_that_see_nothing", [](int64_t, std::vector<float>& mask) { Causal(mask, 256, 10, 54, Range(0, 54)); });
  return all;
}

INSTANTIATE_TEST_SUITE_P(All, Node, testing::ValuesIn(Cases()), [](const auto& info) { return info.param.name; });

bool Supported(const std::function<ggml_tensor*(ggml_context*)>& make) {
  const std::unique_ptr<ggml_context, decltype(&ggml_free)> context(
      ggml_init({64 * ggml_tensor_overhead(), nullptr, true}), &ggml_free);
  return ggml_backend_dev_supports_op(ggml_backend_dev_by_name("FlashPrefill"), make(context.get()));
}

TEST(Claim, PromptsOnly) {
  struct Shape {
    int64_t rows = 128, head_dim_v = 64;
    float bias = 0, softcap = 0;
    bool mask = true, sinks = false;
    ggml_type k_type = GGML_TYPE_F16;
  };
  const auto claimed = [](const Shape& s) {
    return Supported([&](ggml_context* x) {
      ggml_tensor* q = ggml_new_tensor_3d(x, GGML_TYPE_F32, 64, s.rows, 4);
      ggml_tensor* k = ggml_new_tensor_3d(x, s.k_type, 64, 512, 2);
      ggml_tensor* v = ggml_new_tensor_3d(x, GGML_TYPE_F16, s.head_dim_v, 512, 2);
      ggml_tensor* mask = s.mask ? ggml_new_tensor_2d(x, GGML_TYPE_F16, 512, s.rows) : nullptr;
      ggml_tensor* node = ggml_flash_attn_ext(x, q, k, v, mask, 0.1f, s.bias, s.softcap);
      if (s.sinks) ggml_flash_attn_ext_add_sinks(node, ggml_new_tensor_1d(x, GGML_TYPE_F32, 4));
      return node;
    });
  };
  EXPECT_TRUE(claimed({}));
  EXPECT_TRUE(claimed({.k_type = GGML_TYPE_Q8_0}));
  EXPECT_FALSE(claimed({.rows = 1}));
  EXPECT_FALSE(claimed({.rows = 63}));
  EXPECT_FALSE(claimed({.head_dim_v = 32}));
  EXPECT_FALSE(claimed({.bias = 8}));
  EXPECT_FALSE(claimed({.softcap = 30}));
  EXPECT_FALSE(claimed({.mask = false}));
  EXPECT_FALSE(claimed({.sinks = true}));
  EXPECT_FALSE(Supported([](ggml_context* x) {
    return ggml_mul_mat(x, ggml_new_tensor_2d(x, GGML_TYPE_F32, 64, 64), ggml_new_tensor_2d(x, GGML_TYPE_F32, 64, 64));
  }));
}

TEST(Parameters, ABadOneGivesNoBackend) {
  EXPECT_EQ(ggml_backend_init_by_name("FlashPrefill", "alpha=much"), nullptr);
  EXPECT_EQ(ggml_backend_init_by_name("FlashPrefill", "block_size=100"), nullptr);
}

} // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  ggml_backend_load_all();
  g_reg = argc > 1 ? ggml_backend_load(argv[1]) : nullptr;
  if (!g_reg) {
    std::fprintf(stderr, "usage: node_test <libggml-flashprefill.so>\n");
    return 2;
  }
  return RUN_ALL_TESTS();
}
