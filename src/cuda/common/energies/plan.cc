// Host side of selection by energies: shapes, scratch memory and launches. See plan.h.
#include "cuda/common/energies/plan.h"

#include "cuda/common/energies/pool.h"
#include "cuda/common/energies/score.h"

namespace flashprefill::cuda {
namespace {

// Whether rows of q can be read where they lie, 16 bytes at a time and by the copy engine.
bool ReadsRowsOfQ(const Problem& p) {
  const int64_t size[3] = {p.cu_seqlens_q ? 1 : p.batch, p.cu_seqlens_q ? p.total_q : p.max_seqlen_q, p.q_heads};
  const Tensor& q = p.q;
  bool can = reinterpret_cast<uintptr_t>(q.data) % 16 == 0 && q.stride[3] == 1;
  for (int axis = 0; axis < 3; ++axis) {
    can &= size[axis] <= 1 || (q.stride[axis] > 0 && q.stride[axis] % 8 == 0 && q.stride[axis] < int64_t{1} << 38);
  }
  return can;
}

} // namespace

EnergiesPlan EnergiesPlan::Of(const Problem& p, const Policy& policy, const EnergyScores& scores, const Gpu& gpu) {
  EnergiesPlan plan;
  plan.d_ = DeviceProblem::Of(p);
  plan.rules_ = TileRules::Of(p, policy);
  plan.gpu_ = gpu;
  plan.scores_ = scores;
  plan.scores_.query_pool = std::min(scores.query_pool, plan.rules_.tile_tokens);
  plan.rows_per_head_ = DivUp(plan.rules_.tile_tokens, plan.scores_.query_pool);
  const int rows = plan.rows_per_head_ * plan.rules_.heads_per_tile;
  const bool small_units = scores.sketch && !gpu.portable; // half the rows are half the work there
  plan.unit_rows_ = small_units && rows <= 4 ? (rows <= 2 ? 2 : 4) : rows <= 8 ? 8 : rows <= 32 ? 32 : 128;
  const bool readable = ReadsRowsOfQ(p);
  plan.rows_in_q_ = plan.scores_.query_pool == 1 && plan.unit_rows_ == 128 && !scores.sketch && readable;
  plan.rows_pooled_ = plan.unit_rows_ == 128 && !plan.rows_in_q_;
  plan.rows_aligned_ = readable && p.head_dim % 8 == 0;
  return plan;
}

const char* EnergiesPlan::Unsupported() const {
  const Problem& p = d_.p;
  if (const char* unsupported = PoolUnsupported(p.head_dim)) return unsupported;
  if (scores_.query_metric && p.batch > 65535) return "query_metric is given for more than 65535 sequences";
  return ScoreUnsupported(gpu_, p.head_dim, DivUp<int64_t>(p.max_seqlen_k, rules_.block_size), unit_rows_,
                          scores_.sketch);
}

void EnergiesPlan::Take(Workspace& workspace, bool correction) {
  const Problem& p = d_.p;
  means = TakeMeans(workspace, p, rules_.block_size, correction || !scores_.sketch, correction);
  if (scores_.sketch) sketch_ = TakeMeans(workspace, p, rules_.block_size, 2 + scores_.outliers);
  if (scores_.query_metric) {
    metric_ = workspace.Take<float>(int64_t{p.batch} * p.kv_heads * kMetricParts * MeanPitch(p));
  }
  if (rows_pooled_) {
    q_rows_ = workspace.Take<uint16_t>((scores_.sketch ? 2 : 1) * UnitCount() * unit_rows_ * MeanPitch(p));
  }
}

cudaError_t EnergiesPlan::Launch(const SelectTarget& target) const {
  const Problem& p = d_.p;
  TileRules rules = rules_;
  rules.dense_up_to_keys = target.follow.dense_up_to_keys;
  if (p.max_seqlen_k <= rules.dense_up_to_keys) return LaunchForced(d_, rules, target);
  PoolArgs pool = PoolArgs::Of(d_, rules);
  pool.k_means = means.k;
  pool.v_means = means.v;
  pool.skip_forced = true;
  pool.sketch = sketch_;
  pool.outliers = scores_.outliers;
  pool.metric = metric_;
  pool.q_rows = q_rows_;
  pool.query_pool = scores_.query_pool;
  pool.unit_rows = unit_rows_;
  pool.squares = scores_.sketch;
  pool.square_scale = p.softmax_scale / 2;
  pool.fallback = target.mask.fallback;
  pool.attend_counter = target.follow.attend_counter;
  if (scores_.query_metric) {
    if (cudaError_t error = LaunchMetric(pool, rows_aligned_, target.stream)) return error;
  }
  if (cudaError_t error = LaunchPool(pool, target.stream)) return error;
  return LaunchScores(target, rules);
}

cudaError_t EnergiesPlan::LaunchScores(const SelectTarget& target, const TileRules& rules) const {
  const Problem& p = d_.p;
  ScoreArgs a{};
  a.d = d_;
  a.rules = rules;
  a.keep = scores_.keep;
  a.exponent_scale = ExponentScale(p);
  a.query_pool = scores_.query_pool;
  a.rows_per_head = rows_per_head_;
  a.unit_rows = unit_rows_;
  a.rows_in_q = rows_in_q_;
  a.rows_aligned = rows_aligned_;
  a.square_scale = p.softmax_scale / 2;
  a.sketch = scores_.sketch;
  a.outliers = scores_.outliers;
  a.mean_rows = MeanRows(p, rules.block_size);
  a.unit_count = UnitCount();
  a.bits = target.mask.bits;
  a.counts = target.mask.counts;
  a.words = target.mask.words;
  a.keys = a.sketch ? sketch_ : means.k;
  a.rows = q_rows_;
  a.pitch = MeanPitch(p);
  return LaunchScore(a, gpu_, target.stream);
}

const char* ScoreUnsupported(const Gpu& gpu, int head_dim, int64_t max_blocks, int unit_rows, bool sketch) {
  const bool fits = gpu.portable ? ScoreFitsPortable(gpu, head_dim, max_blocks, unit_rows, sketch)
                                 : ScoreFitsSm90(head_dim, max_blocks, unit_rows, sketch);
  if (fits) return nullptr;
  return "max_seqlen_k / block_size is too large for the energies of a tile to stay in shared memory: it must be "
         "smaller (or block_size larger) with this head_dim and query_pool";
}

cudaError_t LaunchScore(const ScoreArgs& args, const Gpu& gpu, cudaStream_t stream) {
  return gpu.portable ? LaunchScorePortable(args, gpu, stream) : LaunchScoreSm90(args, stream);
}

} // namespace flashprefill::cuda
