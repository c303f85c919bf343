/* The C ABI from nothing to a result: one sequence of 4,096 tokens, 8 query heads over 2 KV heads, fp32.
 * Prints the density that FlashPrefill kept. Every 256 tokens of the inputs the topic changes, and queries ask for
 * keys of their own topic: noise alone would be kept whole. */
#include <flashprefill/flashprefill.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { kTokens = 4096, kHeads = 8, kKvHeads = 2, kDim = 64, kStretch = 256, kTopics = 8 };

static void check(fp_status status, const char* what) {
  if (status == FP_OK) return;
  fprintf(stderr, "%s: %s\n", what, fp_last_error());
  exit(1);
}

/* Scratch memory wants 64-byte alignment. */
static void* scratch(size_t bytes) {
  void* data = aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
  if (!data) exit(1);
  return data;
}

static float* noise(size_t n, unsigned seed) {
  float* x = malloc(n * sizeof(float));
  if (!x) exit(1);
  for (size_t i = 0; i < n; ++i) {
    seed = seed * 1664525u + 1013904223u;
    x[i] = (float)(seed >> 8) / 8388608.0f - 1.0f;
  }
  return x;
}

/* Queries or keys: noise around the topic of each stretch of tokens. */
static float* about_topics(int64_t heads, const float* topics, unsigned seed) {
  float* x = noise((size_t)(kTokens * heads * kDim), seed);
  for (int64_t token = 0; token < kTokens; ++token) {
    const int64_t topic = token / kStretch * 5 % kTopics;
    for (int64_t i = 0; i < heads * kDim; ++i) x[token * heads * kDim + i] += 1.5f * topics[topic * kDim + i % kDim];
  }
  return x;
}

static void contiguous(fp_tensor* t, float* data, int64_t heads) {
  t->data = data;
  t->dtype = FP_F32;
  t->stride[0] = (int64_t)kTokens * heads * kDim;
  t->stride[1] = heads * kDim;
  t->stride[2] = kDim;
  t->stride[3] = 1;
}

int main(void) {
  float* topics = noise((size_t)kTopics * kDim, 4);
  float* q = about_topics(kHeads, topics, 1);
  float* k = about_topics(kKvHeads, topics, 2);
  float* v = noise((size_t)kTokens * kKvHeads * kDim, 3);
  float* out = malloc((size_t)kTokens * kHeads * kDim * sizeof(float));
  if (!out) return 1;

  fp_problem problem;
  fp_problem_init(&problem);
  problem.batch = 1;
  problem.q_heads = kHeads;
  problem.kv_heads = kKvHeads;
  problem.head_dim = kDim;
  problem.softmax_scale = 1.0f / sqrtf(kDim);
  problem.total_q = problem.max_seqlen_q = problem.max_seqlen_k = kTokens;
  contiguous(&problem.q, q, kHeads);
  contiguous(&problem.k, k, kKvHeads);
  contiguous(&problem.v, v, kKvHeads);

  fp_flashprefill policy;
  check(fp_policy_init(FP_FLASHPREFILL, &policy, sizeof policy), "fp_policy_init");
  policy.query_pool = 16;

  fp_output output;
  fp_output_init(&output);
  contiguous(&output.out, out, kHeads);

  /* A mask of our own, so that we can ask it what was kept. */
  fp_block_mask mask;
  fp_block_mask_init(&mask);
  check(fp_mask_describe(&problem, &policy.common, &mask), "fp_mask_describe");
  mask.bits = malloc((size_t)(mask.heads * mask.tile_rows * mask.words) * sizeof(uint64_t));
  if (!mask.bits) return 1;

  size_t bytes = 0;
  check(fp_prefill_workspace(&problem, &policy.common, NULL, &bytes), "fp_prefill_workspace");
  void* workspace = scratch(bytes);
  check(fp_prefill(&problem, &policy.common, NULL, &mask, &output, workspace, bytes), "fp_prefill");

  int64_t kept[kHeads], total = 0, sum = 0;
  fp_stats stats;
  fp_stats_init(&stats);
  stats.kept = kept;
  stats.total = &total;
  check(fp_mask_stats(&problem, &mask, &stats), "fp_mask_stats");
  for (int h = 0; h < kHeads; ++h) sum += kept[h];
  printf("flashprefill %s: density %.3f, out[0] = %.6f\n", fp_version(), (double)sum / (double)(total * kHeads),
         out[0]);

  const int right = sum > 0 && sum <= total * kHeads && isfinite(out[0]);
  free(workspace);
  free(mask.bits);
  free(out);
  free(v);
  free(topics);
  free(k);
  free(q);
  return right ? 0 : 1;
}
