// Host side of the guard: see plan.h.
#include "cuda/common/guard/plan.h"

#include <algorithm>

namespace flashprefill::cuda {
namespace {

// Keys of a piece at least: below this the loading of its rows shows.
constexpr int64_t kLeastPiece = 512;
// CTAs that are wanted per multiprocessor: pieces of the last rows take twice as long as those of the first, so one
// for each would leave half of them idle.
constexpr int64_t kWantedCtas = 4;

// The most rows that are audited of a head. Lengths that only the device knows may be any up to the host's bounds.
int64_t MostRows(const Problem& p, const fp_guard& guard) {
  const bool known = !p.cu_seqlens_q && !p.cu_seqlens_k && !p.seqused_k;
  return known ? GuardRowsOf(guard.rows, p.causal, p.max_seqlen_q, p.max_seqlen_k)
               : MostGuardRows(guard.rows, p.causal, p.max_seqlen_q, p.max_seqlen_k);
}

} // namespace

GuardPlan GuardPlan::Of(const Problem& p, const BlockMask& mask, const fp_guard& guard, int processors) {
  GuardPlan plan{};
  GuardArgs& a = plan.args_;
  const Geometry g = Geometry::Of(p, mask);
  a.d = DeviceProblem::Of(p);
  a.rules = TileRules::Of(g);
  a.bits = mask.bits;
  a.counts = mask.counts;
  a.words = g.words;
  a.mask_heads = g.mask_heads;
  a.group = g.group;
  if (HasKeyLists(mask)) {
    a.key_lists = mask.key_lists;
    a.list_stride = KeyListStride(mask);
    a.segment_tokens = SegmentTokens(mask);
    a.segment_tiles = mask.segment_tiles;
    a.segment_rows = static_cast<int>(mask.segment_rows);
    a.max_keys = mask.max_keys;
    a.listed_words = DivUp<int64_t>(p.max_seqlen_k, 64);
  }
  a.rows = guard.rows;
  a.seed = {guard.seed, guard.layer, 0};
  a.exponent_scale = ExponentScale(p);
  a.target = guard.target;
  a.risk = guard.risk;
  a.recall = guard.recall;
  a.recall_low = guard.recall_low;
  a.recall_p05 = guard.recall_p05;
  a.certificate = guard.certificate;
  a.rows_audited = guard.rows_audited;
  a.missed_block = guard.missed_block;
  a.outcome = guard.outcome;
  a.moments = guard.moments;

  a.most_rows = static_cast<int>(std::max<int64_t>(1, MostRows(p, guard)));
  const int64_t unit_rows = int64_t{a.most_rows} * g.group, few = GuardRowsPerWarp(p.head_dim) * kGuardFewWarps;
  a.tile_rows = GuardRowsPerWarp(p.head_dim) * (unit_rows > few ? kGuardManyWarps : kGuardFewWarps);
  a.row_tiles = static_cast<int>(DivUp<int64_t>(unit_rows, a.tile_rows));
  const int64_t ctas = std::max<int64_t>(1, int64_t{p.batch} * p.kv_heads * a.row_tiles);
  const int64_t most = std::max<int64_t>(1, DivUp(p.max_seqlen_k, kLeastPiece));
  a.pieces = static_cast<int>(std::clamp(DivUp(kWantedCtas * processors, ctas), int64_t{1}, most));
  return plan;
}

void GuardPlan::Take(Workspace& workspace) {
  GuardArgs& a = args_;
  const Problem& p = a.d.p;
  const int64_t heads = int64_t{p.batch} * p.q_heads, rows = heads * a.most_rows;
  a.heads = workspace.Take<HeadDraw>(heads);
  a.drawn = workspace.Take<int32_t>(rows);
  a.sparse_tiles = workspace.Take<int32_t>(int64_t{a.mask_heads} * a.rules.tile_rows);
  if (a.listed_words > 0) a.listed = workspace.Take<uint64_t>(rows * a.listed_words);
  a.parts = workspace.Take<RowPart>(int64_t{p.batch} * p.kv_heads * a.row_tiles * a.pieces * a.tile_rows);
  a.recalls = workspace.Take<float>(rows);
  a.shares = workspace.Take<float>(rows);
  a.missed = workspace.Take<int32_t>(rows);
  a.head_moments = workspace.Take<Moments>(heads);
  a.heads_done = workspace.Take<int32_t>(p.batch);
  a.wanted = workspace.Take<int32_t>(int64_t{p.batch} * a.mask_heads);
  a.any_wanted = workspace.Take<int32_t>(1);
}

cudaError_t GuardPlan::LaunchAudit(int draw, int low_outcome, cudaStream_t stream) const {
  if (args_.d.p.batch == 0) return cudaSuccess;
  GuardArgs a = args_;
  a.seed.draw = draw;
  a.low_outcome = low_outcome;
  if (cudaError_t e = LaunchGuardDraw(a, stream)) return e;
  if (a.key_lists) {
    if (cudaError_t e = LaunchGuardListed(a, stream)) return e;
  }
  if (cudaError_t e = LaunchGuardAudit(a, stream)) return e;
  return LaunchGuardReport(a, stream);
}

cudaError_t GuardPlan::LaunchKeepAll(cudaStream_t stream) const {
  return args_.d.p.batch == 0 ? cudaSuccess : LaunchGuardKeepAll(args_, stream);
}

cudaError_t GuardPlan::LaunchJoinMissed(cudaStream_t stream) const {
  return args_.d.p.batch == 0 ? cudaSuccess : LaunchGuardJoinMissed(args_, stream);
}

cudaError_t GuardPlan::LaunchAdopt(const BlockMask& more, cudaStream_t stream) const {
  return args_.d.p.batch == 0 ? cudaSuccess : LaunchGuardAdopt(args_, more.bits, more.key_lists, stream);
}

} // namespace flashprefill::cuda
