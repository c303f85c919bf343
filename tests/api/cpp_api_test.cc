// The C++ API: policies carry the published defaults, the verbs agree with each other, errors are exceptions.
#include <gtest/gtest.h>

#include <flashprefill/flashprefill.hpp>
#include <random>

namespace fp = flashprefill;

namespace {

struct Data {
  fp::Shape shape{.batch = 2, .q_len = 700, .k_len = 1000, .q_heads = 6, .kv_heads = 2, .head_dim = 64};
  std::vector<float> q, k, v, out, lse;
  fp::Problem problem;

  Data() {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& x, int64_t tokens, int64_t heads) {
      x.resize(static_cast<size_t>(shape.batch * tokens * heads * shape.head_dim));
      for (float& value : x) value = 2 * normal(random);
    };
    fill(q, shape.q_len, shape.q_heads);
    fill(k, shape.k_len, shape.kv_heads);
    fill(v, shape.k_len, shape.kv_heads);
    out.resize(q.size());
    lse.resize(q.size() / static_cast<size_t>(shape.head_dim));
    problem = fp::Problem::Rectangular(shape, FP_F32, q.data(), k.data(), v.data());
  }
};

TEST(CppApi, PublishedDefaults) {
  const fp::FlashPrefill f;
  EXPECT_FLOAT_EQ(f.alpha, 0.12f);
  EXPECT_EQ(f.query_pool, 1);
  EXPECT_EQ(f.common.block_size, 128);
  EXPECT_EQ(f.common.sink_blocks, 2);
  EXPECT_EQ(f.common.window_blocks, 4);
  EXPECT_EQ(f.common.dense_tail_blocks, 2);
  EXPECT_EQ(f.common.share_heads, 0);
  EXPECT_EQ(f.common.mean_correction, 0);
  const fp::Sketch s;
  EXPECT_FLOAT_EQ(s.mass, 0.95f);
  EXPECT_TRUE(std::isnan(s.alpha) && std::isnan(s.gain));
  EXPECT_EQ(s.query_metric, 0);
  EXPECT_EQ(s.outliers, 4);
  EXPECT_EQ(s.query_pool, 16);
  EXPECT_EQ(fp::XAttention().stride, 16);
  EXPECT_FLOAT_EQ(fp::RRAttention().threshold, 0.95f);
  EXPECT_FLOAT_EQ(fp::SpargeAttn().cdf, 0.98f);
  EXPECT_TRUE(std::isnan(fp::SpargeAttn().TopK(0.5f).cdf));
  EXPECT_EQ(fp::Prism().common.window_blocks, 2);
  EXPECT_FLOAT_EQ(fp::SampleAttention().sample_ratio, 0.05f);
}

TEST(CppApi, GuardsAPrefillAndAuditsAMask) {
  Data data;
  fp::Sketch policy;
  policy.KeepGain(0.3f).common.dense_tail_blocks = 0;
  policy.common.sink_blocks = 0;
  policy.common.window_blocks = 1;
  fp::Exec exec;
  fp::Guard guard(data.problem, FP_GUARD_STRICT);
  guard.settings.target = 1;
  exec.guard = guard.view();
  fp::prefill(data.problem, policy, fp::Output(data.problem, data.out.data()), exec);
  fp::BlockMask mask = fp::select(data.problem, policy);
  fp::Guard observer(data.problem);
  fp::audit(data.problem, mask, observer);
  EXPECT_EQ(observer.recall.size(), 12u);
  for (size_t i = 0; i < 12; ++i) {
    EXPECT_EQ(guard.outcome[i], FP_GUARD_DENSE);
    EXPECT_EQ(guard.recall[i], 1);
    EXPECT_LT(observer.recall[i], 1);
    EXPECT_LE(observer.recall_low[i], observer.recall[i]);
    EXPECT_EQ(observer.rows_audited[i], 23); // 32 per prompt of 1000 tokens, of which 700 are here
  }
  EXPECT_GT(observer.recall[0], observer.certificate[0]);
  EXPECT_EQ(guard.levels[0], 1);
  std::vector<float> dense(data.out);
  fp::prefill(data.problem, fp::Dense(), fp::Output(data.problem, data.out.data()));
  for (size_t i = 0; i < dense.size(); i += 97) EXPECT_NEAR(dense[i], data.out[i], 1e-5);
  EXPECT_THROW(fp::select(data.problem, policy, exec), fp::Error);
}

TEST(CppApi, AThresholdForEachHead) {
  Data data;
  fp::XAttention policy;
  const std::vector<float> none(static_cast<size_t>(data.problem.q_heads), 0.0f);
  const fp::Stats least = fp::select(data.problem, policy.SetHeadThresholds(none)).stats(data.problem);
  const std::vector<float> all(none.size(), 1.0f);
  const fp::Stats most = fp::select(data.problem, policy.SetHeadThresholds(all)).stats(data.problem);
  EXPECT_LT(least.density(), most.density());
  EXPECT_FLOAT_EQ(static_cast<float>(most.density()), 1);
  const std::vector<float> more(none.size() + 1, 1.0f);
  EXPECT_THROW(fp::select(data.problem, policy.SetHeadThresholds(more)), fp::Error);
}

TEST(CppApi, OnACpuPrefillSelectsForEveryLength) {
  const fp::FlashPrefill policy;
  int64_t keys = -1;
  EXPECT_EQ(fp_prefill_dense_keys(&policy.common, FP_CPU, nullptr, &keys), FP_OK);
  EXPECT_EQ(keys, 0);
  EXPECT_EQ(fp_prefill_dense_keys(&policy.common, 7, nullptr, &keys), FP_INVALID_ARGUMENT);
}

TEST(CppApi, SelectThenAttendEqualsPrefill) {
  Data data;
  fp::FlashPrefill policy(0.95f);
  policy.common.mean_correction = 1;
  policy.common.dense_tail_blocks = 0;
  const fp::BlockMask mask = fp::select(data.problem, policy);
  fp::attend(data.problem, mask, fp::Output(data.problem, data.out.data(), data.lse.data()));
  const fp::Stats stats = mask.stats(data.problem);
  EXPECT_GT(stats.density(), 0.1);
  EXPECT_LT(stats.density(), 1.0);

  std::vector<float> again(data.out.size()), lse(data.lse.size());
  fp::BlockMask kept = fp::BlockMask::For(data.problem, policy);
  fp::prefill(data.problem, policy, fp::Output(data.problem, again.data(), lse.data()), {}, &kept);
  EXPECT_EQ(again, data.out);
  EXPECT_EQ(lse, data.lse);
  EXPECT_EQ(kept.stats(data.problem).kept, stats.kept);
}

TEST(CppApi, EveryPolicySelects) {
  Data data;
  const auto check = [&](const auto& policy) {
    fp::BlockMask mask = fp::BlockMask::For(data.problem, policy);
    fp::prefill(data.problem, policy, fp::Output(data.problem, data.out.data(), data.lse.data()), {}, &mask);
    std::vector<float> again(data.out.size());
    fp::attend(data.problem, fp::select(data.problem, policy), fp::Output(data.problem, again.data()));
    EXPECT_EQ(again, data.out);
    return mask.stats(data.problem).density();
  };
  fp::FlexPrefill flex;
  EXPECT_FLOAT_EQ(flex.gamma, 0.9f);
  EXPECT_EQ(flex.min_budget, 512);
  flex.common.block_size = 16;
  flex.min_budget = 16;
  flex.gamma = 0.3f;
  EXPECT_LT(check(flex), 1.0);
  fp::MInference lines;
  EXPECT_EQ(lines.slash, 6096);
  lines.common.block_size = 16;
  lines.vertical = 30, lines.slash = 50;
  const double in_blocks = check(lines);
  lines.rounding = FP_ROUND_TOKENS;
  EXPECT_LT(check(lines), in_blocks + 1e-9);
  const std::vector<fp_minference_head> heads(static_cast<size_t>(data.problem.q_heads), {FP_A_SHAPE, 16, 16});
  fp::MInference table;
  table.SetHeads(heads).common.block_size = 16;
  EXPECT_LT(check(table), 1.0);
}

TEST(CppApi, MaskBitsCanBeSetByHand) {
  Data data;
  fp::BlockMask mask = fp::BlockMask::For(data.problem, fp::Dense());
  EXPECT_EQ(mask.stats(data.problem).density(), 0.0);
  mask.set(5, 2, 4, true);
  EXPECT_TRUE(mask.test(5, 2, 4));
  EXPECT_FALSE(mask.test(5, 2, 3));
  EXPECT_EQ(mask.stats(data.problem).kept[5], 1);
}

TEST(CppApi, DenseWithoutCausalAndPackedLengths) {
  Data data;
  const std::vector<int32_t> cu_q{0, 100, 800}, cu_k{0, 900, 1600};
  fp::Shape shape = data.shape;
  shape.k_len = 900;
  fp::Problem packed =
      fp::Problem::Packed(shape, FP_F32, data.q.data(), data.k.data(), data.v.data(), cu_q.data(), cu_k.data());
  packed.causal = 0;
  fp::prefill(packed, fp::Dense(), fp::Output(packed, data.out.data()));
  for (size_t i = 0; i < 800u * 6 * 64; ++i) ASSERT_TRUE(std::isfinite(data.out[i]));
}

TEST(CppApi, ErrorsAreExceptionsThatNameTheArgument) {
  Data data;
  data.problem.softmax_scale = -1;
  try {
    fp::select(data.problem, fp::Streaming());
    FAIL() << "not refused";
  } catch (const fp::Error& error) {
    EXPECT_EQ(error.status(), FP_INVALID_ARGUMENT);
    EXPECT_STREQ(error.what(), "softmax_scale is -1; it must be finite and above 0");
  }
  data.problem.softmax_scale = 1;
  fp::Sketch sketch;
  sketch.KeepMass(2);
  EXPECT_THROW(fp::select(data.problem, sketch), fp::Error);
  EXPECT_NO_THROW(fp::select(data.problem, sketch.KeepGain(0.1f)));
  EXPECT_NO_THROW(fp::select(data.problem, sketch.KeepMass(0.5f)));
  sketch.KeepFrom(0.5f).outliers = 99;
  EXPECT_THROW(fp::select(data.problem, sketch), fp::Error);
}

} // namespace
