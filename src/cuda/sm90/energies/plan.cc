// Host side of selection by energies: shapes, scratch memory and launches. See plan.h.
#include "cuda/sm90/energies/plan.h"

#include "cuda/common/tensor_map.h"
#include "cuda/sm90/energies/pool.h"
#include "cuda/sm90/energies/score.h"

namespace flashprefill::cuda {
namespace {

// Sizes of q as the copy engine sees it: columns, heads, tokens, sequences.
void SizesOfQ(const Problem& p, int64_t (&size)[4]) {
  size[0] = p.head_dim;
  size[1] = p.q_heads;
  size[2] = p.cu_seqlens_q ? p.total_q : p.max_seqlen_q;
  size[3] = p.cu_seqlens_q ? 1 : p.batch;
}

bool CopyEngineReadsQ(const Problem& p) {
  int64_t size[4];
  SizesOfQ(p, size);
  const Tensor& q = p.q;
  bool can = reinterpret_cast<uintptr_t>(q.data) % 16 == 0 && q.stride[3] == 1;
  for (int axis = 0; axis < 3; ++axis) {
    can &=
        size[2 - axis + 1] <= 1 || (q.stride[axis] > 0 && q.stride[axis] % 8 == 0 && q.stride[axis] < int64_t{1} << 38);
  }
  return can;
}

} // namespace

EnergiesPlan EnergiesPlan::Of(const Problem& p, const Policy& policy, const EnergyScores& scores) {
  EnergiesPlan plan;
  plan.d_ = DeviceProblem::Of(p);
  plan.rules_ = TileRules::Of(p, policy);
  plan.scores_ = scores;
  plan.scores_.query_pool = std::min(scores.query_pool, plan.rules_.tile_tokens);
  plan.rows_per_head_ = DivUp(plan.rules_.tile_tokens, plan.scores_.query_pool);
  const int rows = plan.rows_per_head_ * plan.rules_.heads_per_tile;
  plan.unit_rows_ = rows <= 8 ? 8 : rows <= 32 ? 32 : 128;
  const bool readable = CopyEngineReadsQ(p);
  plan.rows_in_q_ = plan.scores_.query_pool == 1 && plan.unit_rows_ == 128 && !scores.sketch && readable;
  plan.rows_pooled_ = plan.unit_rows_ == 128 && !plan.rows_in_q_;
  plan.rows_aligned_ = readable && p.head_dim % 8 == 0;
  return plan;
}

const char* EnergiesPlan::Unsupported() const {
  const Problem& p = d_.p;
  if (const char* unsupported = PoolUnsupported(p.head_dim)) return unsupported;
  if (scores_.query_metric && p.batch > 65535) return "query_metric is given for more than 65535 sequences";
  return ScoreUnsupported(p.head_dim, DivUp<int64_t>(p.max_seqlen_k, rules_.block_size), unit_rows_, scores_.sketch);
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

  const int64_t pitch = MeanPitch(p), planes = a.sketch ? 2 + a.outliers : 1;
  const TensorMapShape keys{{p.head_dim, planes * p.kv_heads * a.mean_rows, 1, 1}, {pitch, 0, 0}, kStepBlocks, 1};
  if (cudaError_t error = MakeTensorMap(&a.k_map, a.sketch ? sketch_ : means.k, p.k.dtype, keys)) return error;
  TensorMapShape rows{
      {p.head_dim, (a.sketch ? 2 : 1) * a.unit_count * unit_rows_, 1, 1}, {pitch, 0, 0}, ScoreColumns(unit_rows_), 1};
  if (rows_in_q_) {
    SizesOfQ(p, rows.size);
    for (int i = 0; i < 3; ++i) rows.stride[i] = p.q.stride[2 - i];
    rows.box_heads = rules.heads_per_tile;
    rows.box_tokens = rules.tile_tokens;
  }
  if (rows_in_q_ || rows_pooled_) {
    if (cudaError_t error = MakeTensorMap(&a.q_map, rows_in_q_ ? p.q.data : q_rows_, p.q.dtype, rows)) return error;
  }
  return LaunchScore(a, target.stream);
}

} // namespace flashprefill::cuda
