// The C++ API: select once, read the mask's density, attend; then both verbs in one call, which must give the same
// bits. Every 256 tokens of the inputs the topic changes, and queries ask for keys of their own topic: noise alone
// would be kept whole.
#include <cstdio>
#include <flashprefill/flashprefill.hpp>
#include <random>
#include <vector>

namespace fp = flashprefill;

int main() {
  const fp::Shape shape{.batch = 1, .q_len = 4096, .k_len = 4096, .q_heads = 8, .kv_heads = 2, .head_dim = 64};
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto noise = [&](int64_t heads) {
    std::vector<float> x(static_cast<size_t>(shape.q_len * heads * shape.head_dim));
    for (float& value : x) value = normal(random);
    return x;
  };
  const std::vector<float> topics = noise(1); // the first few of its tokens
  const auto about_topics = [&](int64_t heads) {
    std::vector<float> x = noise(heads);
    for (size_t i = 0; i < x.size(); ++i) {
      const int64_t token = static_cast<int64_t>(i) / (heads * shape.head_dim), topic = token / 256 * 5 % 8;
      x[i] += 1.5f * topics[static_cast<size_t>(topic * shape.head_dim) + i % static_cast<size_t>(shape.head_dim)];
    }
    return x;
  };
  const std::vector<float> q = about_topics(shape.q_heads), k = about_topics(shape.kv_heads), v = noise(shape.kv_heads);
  std::vector<float> out(q.size()), again(q.size());

  try {
    const fp::Problem problem = fp::Problem::Rectangular(shape, FP_F32, q.data(), k.data(), v.data());
    fp::FlashPrefill policy;
    policy.query_pool = 16;
    policy.common.mean_correction = 1;

    const fp::BlockMask mask = fp::select(problem, policy);
    fp::attend(problem, mask, fp::Output(problem, out.data()));
    fp::prefill(problem, policy, fp::Output(problem, again.data()));

    std::printf("flashprefill %s: density %.3f, out[0] = %.6f\n", fp_version(), mask.stats(problem).density(),
                static_cast<double>(out[0]));
    return out == again ? 0 : 1;
  } catch (const fp::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
