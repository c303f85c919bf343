// Host side of selections without scores, and of pooling for its own sake. See forced.h.
#include "cuda/common/energies/forced.h"

#include "cuda/common/energies/mask.h"
#include "cuda/common/energies/pool.h"
#include "cuda/common/gather/args.h"

namespace flashprefill::cuda {

// The last tile before the dense tail begins at most at position max_seqlen_k - 1 - (rows of the tail). Without
// causality all tiles see all keys.
bool KeepsEverything(const Problem& p, const Policy& policy) {
  const Geometry g = Geometry::Of(p, policy);
  bool tail_everywhere = p.final_chunk != 0;
  for (int b = 0; p.final_chunks && b < p.batch; ++b)
    tail_everywhere = (b == 0 || tail_everywhere) && p.final_chunks[b];
  const int64_t tail =
      tail_everywhere ? DivUp<int64_t>(int64_t{policy.dense_tail_blocks} * policy.block_size, g.tile_tokens) : 0;
  if (!p.causal && p.total_q > 0) {
    const int64_t blocks = DivUp<int64_t>(p.max_seqlen_k, policy.block_size);
    return tail * g.tile_tokens >= p.max_seqlen_q ||
           policy.sink_blocks >= blocks - std::max(0, policy.window_blocks - 1);
  }
  const int64_t begin = p.max_seqlen_k - 1 - tail * g.tile_tokens;
  return p.total_q == 0 || begin < 0 ||
         policy.sink_blocks >= begin / policy.block_size - std::max(0, policy.window_blocks - 1);
}

void* TakeMeans(Workspace& workspace, const Problem& p, int block_size, int planes) {
  return workspace.Take<uint16_t>(planes * p.kv_heads * MeanRows(p, block_size) * MeanPitch(p));
}

Means TakeMeans(Workspace& workspace, const Problem& p, int block_size, bool k, bool v) {
  Means means;
  if (k) means.k = TakeMeans(workspace, p, block_size);
  if (v) means.v = TakeMeans(workspace, p, block_size);
  return means;
}

cudaError_t LaunchMeans(const DeviceProblem& d, const TileRules& rules, const Means& means, bool skip_forced,
                        cudaStream_t stream) {
  PoolArgs pool = PoolArgs::Of(d, rules);
  pool.k_means = means.k;
  pool.v_means = means.v;
  pool.skip_forced = skip_forced;
  return LaunchPool(pool, stream);
}

cudaError_t LaunchForced(const DeviceProblem& d, const TileRules& rules, const SelectTarget& target) {
  const BlockMask& mask = target.mask;
  if (cudaError_t error = LaunchEmptyLists(mask, target.stream)) return error;
  return LaunchMask({d, rules, mask.bits, mask.counts, mask.fallback, d.p.kv_heads * rules.units_per_kv, mask.words,
                     target.follow.attend_counter},
                    target.stream);
}

ForcedPlan ForcedPlan::Of(const Problem& p, const Policy& policy, const Gpu&) {
  ForcedPlan plan;
  plan.d_ = DeviceProblem::Of(p);
  plan.rules_ = TileRules::Of(p, policy);
  plan.corrects_ = policy.mean_correction != 0;
  return plan;
}

const char* ForcedPlan::Unsupported() const { return corrects_ ? PoolUnsupported(d_.p.head_dim) : nullptr; }

void ForcedPlan::Take(Workspace& workspace, bool correction) {
  means = TakeMeans(workspace, d_.p, rules_.block_size, correction, correction);
}

cudaError_t ForcedPlan::Launch(const SelectTarget& target) const {
  if (cudaError_t error = LaunchForced(d_, rules_, target)) return error;
  const bool pools = means.v && !rules_.keeps_everything;
  return pools ? LaunchMeans(d_, rules_, means, true, target.stream) : cudaSuccess;
}

} // namespace flashprefill::cuda
