// The runtime that threads come from has a name, and calls from several threads at once don't disturb each other.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <flashprefill/flashprefill.hpp>
#include <thread>

namespace fp = flashprefill;

namespace {

TEST(Threads, TheRuntimeHasAName) {
  char name[256];
  EXPECT_GT(fp_thread_runtime(name, sizeof name), 0u);
  EXPECT_GT(std::string(name).size(), 0u);
  char cut[4];
  EXPECT_GT(fp_thread_runtime(cut, sizeof cut), 3u);
  EXPECT_EQ(std::string(cut).size(), 3u);
}

TEST(Threads, ErrorsBelongToTheThreadThatMadeThem) {
  EXPECT_EQ(fp_policy_init(99, nullptr, 0), FP_INVALID_ARGUMENT);
  std::string others;
  std::thread([&] { others = fp_last_error(); }).join();
  EXPECT_EQ(others, "");
  EXPECT_NE(std::string(fp_last_error()), "");
}

// A problem of one sequence, and what Sketch makes of it.
struct Call {
  Call() {
    const fp::Shape shape{.batch = 1, .q_len = 500, .k_len = 500, .q_heads = 4, .kv_heads = 2, .head_dim = 32};
    for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<float>((i * 37) % 101) / 50 - 1;
    for (size_t i = 0; i < k.size(); ++i) k[i] = static_cast<float>((i * 53) % 97) / 50 - 1;
    for (size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>((i * 71) % 89) / 50 - 1;
    problem = fp::Problem::Rectangular(shape, FP_F32, q.data(), k.data(), v.data());
    policy.common.dense_tail_blocks = 0;
    policy.common.block_size = 32;
  }
  std::vector<float> Run() const {
    std::vector<float> out(q.size());
    fp::prefill(problem, policy, fp::Output(problem, out.data()));
    return out;
  }
  std::vector<float> q = std::vector<float>(500 * 4 * 32), k = std::vector<float>(500 * 2 * 32), v = k;
  fp::Problem problem;
  fp::Sketch policy;
};

TEST(Threads, CallsAtTheSameTimeGiveTheSameBits) {
  const Call call;
  std::vector<std::vector<float>> out(4);
  std::vector<std::thread> threads;
  for (auto& mine : out) threads.emplace_back([&] { mine = call.Run(); });
  for (std::thread& thread : threads) thread.join();
  for (const auto& mine : out) EXPECT_EQ(mine, out[0]);
}

// libgomp's threads don't survive a fork, and its next region in the child would wait for them.
TEST(Threads, AForkedChildComputesAndSoDoesItsParent) {
  const Call call;
  const std::vector<float> before = call.Run();
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    _exit(call.Run() == before ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
  EXPECT_EQ(call.Run(), before);
}

} // namespace
