// Host side of the guard: see plan.h.
#include "cuda/common/guard/plan.h"

#include <algorithm>

namespace flashprefill::cuda {
namespace {

// Keys of a piece at least: below this the loading of its rows shows.
constexpr int64_t kLeastPiece = 256;
// CTAs that are wanted per multiprocessor, of which two run at a time: the last pieces of tiles are shorter.
constexpr int64_t kWantedCtas = 4;

// The most rows that are audited of a head. Lengths that only the device knows may be any up to the host's bounds.
int64_t MostRows(const Problem& p, const fp_guard& guard) {
  const bool known = !p.cu_seqlens_q && !p.cu_seqlens_k && !p.seqused_k;
  return known ? GuardRowsOf(guard.rows, p.causal, p.max_seqlen_q, p.max_seqlen_k)
               : MostGuardRows(guard.rows, p.causal, p.max_seqlen_q, p.max_seqlen_k);
}

} // namespace

GuardPlan GuardPlan::Of(const Problem& p, const BlockMask& mask, const fp_guard& guard, const Gpu& gpu,
                        int processors) {
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
  a.tile_rows = GuardTileRows(p.head_dim, gpu.portable);
  a.row_tiles = static_cast<int>(DivUp<int64_t>(int64_t{a.most_rows} * g.group, a.tile_rows));
  a.any_block = a.listed_words > 0 || GuardStepKeys(false, gpu.portable) / mask.block_size > 1;
  plan.portable_ = gpu.portable;
  // Pieces of equal lengths, of whole steps: those of a causal mask's first rows are fewer.
  const int64_t units = std::max<int64_t>(1, int64_t{p.batch} * p.kv_heads);
  const int64_t unseen = p.causal ? std::min(p.max_seqlen_q, p.max_seqlen_k) / 2 * (a.row_tiles - 1) : 0;
  const int64_t keys = units * (a.row_tiles * p.max_seqlen_k - unseen);
  const int64_t step = GuardStepKeys(a.any_block, gpu.portable), size = mask.block_size;
  const int64_t run = std::max<int64_t>(1, step / size) * size;
  const int64_t wanted = std::max(kLeastPiece, DivUp(keys, kWantedCtas * processors));
  a.piece_keys = static_cast<int>(DivUp(std::min(wanted, std::max<int64_t>(1, p.max_seqlen_k)), run) * run);
  a.pieces = static_cast<int>(std::max<int64_t>(1, DivUp<int64_t>(p.max_seqlen_k, a.piece_keys)));
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

cudaError_t GuardPlan::LaunchAudit(int draw, cudaStream_t stream) const {
  if (args_.d.p.batch == 0) return cudaSuccess;
  GuardArgs a = args_;
  a.seed.draw = draw;
  if (cudaError_t e = LaunchGuardDraw(a, stream)) return e;
  if (a.key_lists) {
    if (cudaError_t e = LaunchGuardListed(a, stream)) return e;
  }
  return portable_ ? LaunchGuardAuditPortable(a, stream) : LaunchGuardAuditSm90(a, stream);
}

cudaError_t GuardPlan::LaunchReport(int draw, int low_outcome, cudaStream_t stream) const {
  if (args_.d.p.batch == 0) return cudaSuccess;
  GuardArgs a = args_;
  a.seed.draw = draw;
  a.low_outcome = low_outcome;
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
