// Host side of selection by pooled rows. See plan.h.
#include "cuda/common/pooled/plan.h"

#include "cuda/common/energies/pool.h"
#include "cuda/common/tensor_access.h"

namespace flashprefill::cuda {
namespace {

constexpr int64_t kLogitBytes = int64_t{256} << 20; // of a round, unless one panel of all heads needs more

} // namespace

PooledPlan PooledPlan::Of(const Problem& p, const Policy& policy, const Gpu& gpu, int row_tokens, int bands) {
  PooledPlan plan{};
  plan.gpu = gpu;
  PooledShape& a = plan.shape;
  a.d = DeviceProblem::Of(p);
  a.rules = TileRules::Of(p, policy);
  a.row_tokens = row_tokens;
  a.row_room = static_cast<int>(p.total_q / row_tokens + p.batch);
  a.panel_room = static_cast<int>(p.total_q / (int64_t{kPanelRows} * row_tokens) + p.batch);
  a.tiles_per_panel = kPanelRows * row_tokens / kTileRows; // block sizes are multiples of 16, so it is whole
  a.bands.count = bands;
  for (auto& dims : a.bands.dims) std::fill(std::begin(dims), std::end(dims), ~0u);
  a.pitch = MeanPitch(p);
  a.mean_rows = MeanRows(p, policy.block_size);
  const int64_t blocks = DivUp<int64_t>(p.max_seqlen_k, policy.block_size);
  a.logit_stride = std::max<int64_t>(1, DivUp<int64_t>(blocks, 16)) * 16;
  a.exponent_scale = ExponentScale(p);
  a.by_row = Divider::Of(row_tokens);
  a.by_panel = Divider::Of(int64_t{kPanelRows} * row_tokens);
  a.by_panel_tiles = Divider::Of(a.tiles_per_panel);
  a.by_heads = Divider::Of(p.q_heads);
  a.by_kv = Divider::Of(p.kv_heads);
  a.by_blocks = Divider::Of(std::max<int64_t>(1, blocks));
  a.by_page = Divider::Of(std::max(1, p.page_size));
  const int64_t panel_bytes = int64_t{p.q_heads} * bands * kPanelRows * a.logit_stride * 4;
  plan.round_panels = static_cast<int>(std::clamp<int64_t>(kLogitBytes / panel_bytes, 1, std::max(1, a.panel_room)));
  return plan;
}

const char* PooledPlan::Unsupported() const {
  const Problem& p = shape.d.p;
  if (const char* unsupported = PoolUnsupported(p.head_dim)) return unsupported;
  if (!FewTokens(p)) return "fewer than 2^30 tokens on CUDA";
  if (p.batch > 65535 || p.q_heads > 65535) return "at most 65535 sequences and query heads with this policy on CUDA";
  if (!PooledKeeps(gpu, DivUp<int64_t>(p.max_seqlen_k, shape.rules.block_size))) {
    return "max_seqlen_k / block_size is too large for the scores of a tile to stay in shared memory";
  }
  return nullptr;
}

void PooledPlan::Take(Workspace& workspace, bool correction) {
  const Problem& p = shape.d.p;
  means = TakeMeans(workspace, p, shape.rules.block_size, true, correction);
  shape.k_means = means.k;
  shape.q_rows = workspace.Take<uint16_t>(int64_t{p.q_heads} * shape.row_room * shape.pitch);
  shape.logits =
      workspace.Take<float>(int64_t{p.q_heads} * round_panels * shape.bands.count * kPanelRows * shape.logit_stride);
}

PooledKeepArgs PooledPlan::Keep(const SelectTarget& target) const {
  PooledKeepArgs args{};
  args.shape = shape;
  args.shape.rules.dense_up_to_keys = target.follow.dense_up_to_keys;
  args.bits = target.mask.bits;
  args.counts = target.mask.counts;
  args.fallback = target.mask.fallback;
  args.attend_counter = target.follow.attend_counter;
  args.words = target.mask.words;
  return args;
}

cudaError_t PooledPlan::LaunchKeyMeans(float* k_floats, cudaStream_t stream) const {
  PoolArgs pool = PoolArgs::Of(shape.d, shape.rules);
  pool.k_means = means.k;
  pool.v_means = means.v;
  pool.k_floats = k_floats;
  pool.skip_forced = true;
  return LaunchPool(pool, stream);
}

cudaError_t PooledPlan::LaunchRounds(PooledKeepArgs args, cudaStream_t stream) const {
  PooledShape& a = args.shape;
  for (int first = 0; first < a.panel_room; first += round_panels) {
    a.first_panel = first;
    a.end_panel = std::min(first + round_panels, a.panel_room);
    const cudaError_t error = gpu.portable ? LaunchPooledScorePortable(a, stream) : LaunchPooledScoreSm90(a, stream);
    if (error) return error;
    if (cudaError_t e = LaunchPooledKeep(args, gpu, stream)) return e;
  }
  return cudaSuccess;
}

} // namespace flashprefill::cuda
