// Host side of strided selection. See plan.h.
#include "cuda/common/strided/plan.h"

#include <numeric>

namespace flashprefill::cuda {
namespace {

// Room for one chunk of tiles. At 128K tokens and 32 heads, stride 16 makes three chunks of it, and the time that a
// chunk's last pieces leave idle is 1 %.
constexpr int64_t kChunkBytes = int64_t{256} << 20;

// Whether the copy engine can read runs of cells from q or k itself: the cells are then an axis of it, `stride` tokens
// from one to the next, and the token where they begin is another. A panel of columns must not straddle two tokens.
bool ReadsCells(const Problem& p, const Tensor& t, bool one_sequence, int64_t max_tokens) {
  bool can = p.head_dim % kStridedPanel == 0 && t.stride[3] == 1 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  can &= one_sequence || p.batch == 1 || t.stride[0] == max_tokens * t.stride[1]; // one axis of tokens
  for (int axis = 1; axis < 3; ++axis) {
    can &= t.stride[axis] > 0 && t.stride[axis] % 8 == 0 && t.stride[axis] < int64_t{1} << 30;
  }
  return can;
}

// Tokens of q, and of k without pages, along one axis.
int64_t QueryTokens(const Problem& p) { return p.cu_seqlens_q ? p.total_q : p.batch * p.max_seqlen_q; }
int64_t KeyTokens(const Problem& p) { return p.cu_seqlens_k ? p.total_k : p.batch * p.max_seqlen_k; }

} // namespace

StridedPlan StridedPlan::Of(const Problem& p, const Policy& policy, const StridedScores& scores, const Gpu& gpu) {
  StridedPlan plan;
  plan.d_ = DeviceProblem::Of(p);
  plan.rules_ = TileRules::Of(p, policy);
  plan.gpu_ = gpu;
  plan.scores_ = scores;
  plan.shape_ = {};
  StridedShape& g = plan.shape_;
  g.stride = scores.stride;
  g.log2_stride = std::countr_zero(static_cast<unsigned>(g.stride));
  g.rows_per_unit = kTileRows / g.stride;
  g.log2_rows = std::countr_zero(static_cast<unsigned>(g.rows_per_unit));
  g.means = scores.means;
  g.columns = g.means ? p.head_dim : g.stride * p.head_dim;
  g.pitch = DivUp(g.columns, 8) * 8;
  g.direct_q =
      !gpu.portable && !g.means && QueryTokens(p) >= kTileRows && ReadsCells(p, p.q, p.cu_seqlens_q, p.max_seqlen_q);
  g.box_units =
      g.direct_q ? std::gcd(p.q_heads / p.kv_heads, g.stride) : g.stride; // in q itself a box lies in one tile
  g.cells_per_block = policy.block_size / g.stride;
  g.key_tile_blocks = kKeyTileCells / g.cells_per_block;
  g.key_tile_cells = g.key_tile_blocks * g.cells_per_block;
  g.block_pitch = DivUp(g.key_tile_blocks, 8) * 8;
  g.key_tiles = static_cast<int>(
      std::max<int64_t>(1, DivUp<int64_t>(DivUp<int64_t>(p.max_seqlen_k, g.stride), g.key_tile_cells)));
  g.cell_rows = MeanRows(p, g.stride);
  // Not for many short sequences: one key tile for each of them would be more than all cells.
  g.direct_k = !gpu.portable && !g.means && !p.block_table && g.key_tile_cells == kKeyTileCells &&
               KeyTokens(p) >= kKeyTileCells * g.stride && p.batch * kKeyTileCells < g.cell_rows &&
               ReadsCells(p, p.k, p.cu_seqlens_k, p.max_seqlen_k);
  if (g.direct_k) g.cell_rows = int64_t{p.batch} * kKeyTileCells;
  const int64_t row_bytes = int64_t{g.key_tiles} * (g.block_pitch * 2 + 8) + (g.direct_q ? 0 : g.pitch * 2);
  const int64_t tiles = std::max<int64_t>(1, kChunkBytes / (row_bytes * g.rows_per_unit * p.q_heads));
  const int64_t chunks = std::max<int64_t>(1, DivUp<int64_t>(plan.rules_.tile_rows, tiles)); // of even size
  plan.chunk_tiles_ = static_cast<int>(DivUp(std::max<int64_t>(plan.rules_.tile_rows, 1), chunks));
  g.q_tiles = g.direct_q ? p.batch : plan.chunk_tiles_;
  return plan;
}

const char* StridedPlan::Unsupported() const {
  const Problem& p = d_.p;
  if (p.head_dim > 256) return "head_dim is above 256, the most that the CUDA kernels do";
  if (scores_.head_thresholds && p.q_heads > kMaxHeadThresholds) {
    return "head_thresholds is given for more than 512 query heads";
  }
  if (!StridedKeeps(gpu_, DivUp<int64_t>(p.max_seqlen_k, rules_.block_size))) {
    return "max_seqlen_k / block_size is too large for the masses of a tile to stay in shared memory: at most 58000, "
           "and "
           "25000 where a thread block has 99 KiB";
  }
  return nullptr;
}

void StridedPlan::Take(Workspace& workspace, bool correction) {
  const Problem& p = d_.p;
  const StridedShape& g = shape_;
  const int64_t parts = int64_t{chunk_tiles_} * p.q_heads * g.rows_per_unit * g.key_tiles;
  means = TakeMeans(workspace, p, rules_.block_size, correction, correction);
  k_cells_ = workspace.Take<uint16_t>(p.kv_heads * g.cell_rows * g.pitch);
  q_rows_ = workspace.Take<uint16_t>(QueryRows() * g.pitch);
  sums_ = workspace.Take<uint16_t>(parts * g.block_pitch);
  stats_ = workspace.Take<float>(2 * parts);
}

cudaError_t StridedPlan::LaunchScores(const StridedScoreArgs& args, cudaStream_t stream) const {
  return gpu_.portable ? LaunchStridedScorePortable(args, gpu_, stream) : LaunchStridedScoreSm90(args, stream);
}

cudaError_t StridedPlan::Launch(const SelectTarget& target) const {
  if (means.v) {
    if (cudaError_t e = LaunchMeans(d_, rules_, means, true, target.stream)) return e;
  }
  StridedArgs common{};
  common.d = d_;
  common.rules = rules_;
  common.shape = shape_;
  common.k_cells = k_cells_;
  common.q_rows = q_rows_;
  common.sums = static_cast<__half*>(sums_);
  common.stats = static_cast<float2*>(stats_);
  StridedScoreArgs score{};
  score.exponent_scale = static_cast<float>(scores_.factor * kLog2E);
  StridedKeepArgs keep{};
  keep.forced_first = scores_.forced_first;
  keep.bits = target.mask.bits;
  keep.counts = target.mask.counts;
  keep.words = target.mask.words;
  keep.threshold = scores_.threshold;
  keep.by_head = scores_.head_thresholds != nullptr;
  if (keep.by_head) std::copy_n(scores_.head_thresholds, d_.p.q_heads, keep.head_threshold);

  for (int first = 0; first < rules_.tile_rows; first += chunk_tiles_) {
    common.first_tile = first;
    common.tiles = std::min(chunk_tiles_, rules_.tile_rows - first);
    const bool last = first + common.tiles == rules_.tile_rows;
    if (cudaError_t e = LaunchStridedGather(common, first == 0, first == 0 || !shape_.direct_q, target.stream)) {
      return e;
    }
    score.common = keep.common = common;
    if (cudaError_t e = LaunchScores(score, target.stream)) return e;
    keep.fallback = last ? target.mask.fallback : nullptr;
    keep.attend_counter = last ? target.follow.attend_counter : nullptr;
    if (cudaError_t e = LaunchStridedKeep(keep, gpu_, target.stream)) return e;
  }
  return cudaSuccess;
}

} // namespace flashprefill::cuda
