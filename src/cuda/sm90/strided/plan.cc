// The host side of XAttention and RRAttention: shapes, scratch memory and launches.
#include "cuda/strided.h"

#include <numeric>

#include "cuda/attend.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sm90/grid.h"

namespace flashprefill::cuda {
namespace {

// Of what a chunk of tiles needs. At 128K tokens and 32 heads, stride 16 makes three chunks of it, and what a
// chunk's last pieces leave idle is 1 % of its time.
constexpr int64_t kChunkBytes = int64_t{256} << 20;

struct Method {
  int stride;
  bool means, forced_first;
  float factor, threshold; // factor of a product
  const float* head_thresholds;

  static Method Of(const Problem& p, const Policy& policy) {
    if (policy.kind == FP_XATTENTION) {
      const auto& x = reinterpret_cast<const fp_xattention&>(policy);
      const float* const by_head = x.head_count > 0 ? x.head_thresholds : nullptr;
      return {x.stride, false, true, p.softmax_scale / (static_cast<float>(x.stride) * x.norm), x.threshold, by_head};
    }
    const auto& r = reinterpret_cast<const fp_rrattention&>(policy);
    return {r.stride, true, false, p.softmax_scale, r.threshold, nullptr};
  }
};

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

struct Plan {
  StridedShape shape;
  int chunk_tiles;

  static Plan Of(const Problem& p, const Policy& policy) {
    const Method method = Method::Of(p, policy);
    const Geometry geometry = Geometry::Of(p, policy);
    Plan plan{};
    StridedShape& g = plan.shape;
    g.stride = method.stride;
    g.log2_stride = std::countr_zero(static_cast<unsigned>(g.stride));
    g.rows_per_unit = kTileRows / g.stride;
    g.log2_rows = std::countr_zero(static_cast<unsigned>(g.rows_per_unit));
    g.means = method.means;
    g.columns = g.means ? p.head_dim : g.stride * p.head_dim;
    g.pitch = DivUp(g.columns, 8) * 8;
    g.direct_q = !g.means && QueryTokens(p) >= kTileRows && ReadsCells(p, p.q, p.cu_seqlens_q, p.max_seqlen_q);
    g.box_units = g.direct_q ? std::gcd(geometry.group, g.stride) : g.stride; // in q itself a box lies in one tile
    g.cells_per_block = policy.block_size / g.stride;
    g.key_tile_blocks = kKeyTileCells / g.cells_per_block;
    g.key_tile_cells = g.key_tile_blocks * g.cells_per_block;
    g.block_pitch = DivUp(g.key_tile_blocks, 8) * 8;
    g.key_tiles = static_cast<int>(
        std::max<int64_t>(1, DivUp<int64_t>(DivUp<int64_t>(p.max_seqlen_k, g.stride), g.key_tile_cells)));
    g.cell_rows = MeanRows(p, g.stride);
    // Not where sequences are so many and short that a key tile for each is more than all cells.
    g.direct_k = !g.means && !p.block_table && g.key_tile_cells == kKeyTileCells &&
                 KeyTokens(p) >= kKeyTileCells * g.stride && p.batch * kKeyTileCells < g.cell_rows &&
                 ReadsCells(p, p.k, p.cu_seqlens_k, p.max_seqlen_k);
    if (g.direct_k) g.cell_rows = int64_t{p.batch} * kKeyTileCells;
    const int64_t row_bytes = int64_t{g.key_tiles} * (g.block_pitch * 2 + 8) + (g.direct_q ? 0 : g.pitch * 2);
    const int64_t tiles = std::max<int64_t>(1, kChunkBytes / (row_bytes * g.rows_per_unit * p.q_heads));
    const int64_t chunks = std::max<int64_t>(1, DivUp<int64_t>(geometry.tile_rows, tiles)); // of even size
    plan.chunk_tiles = static_cast<int>(DivUp(std::max<int64_t>(geometry.tile_rows, 1), chunks));
    g.q_tiles = g.direct_q ? p.batch : plan.chunk_tiles;
    return plan;
  }

  int64_t QueryRows(const Problem& p) const { return shape.q_tiles * p.q_heads * shape.rows_per_unit; }
};

cudaError_t MakeMaps(const Problem& p, const StridedShape& g, const StridedScratch& scratch, int64_t q_rows,
                     StridedScoreArgs& args) {
  const TensorMapShape keys{{g.columns, p.kv_heads * g.cell_rows, 1, 1}, {g.pitch, 0, 0}, kKeyTileCells, 1};
  if (cudaError_t e = MakeTensorMap(&args.k_map, scratch.k_cells, p.k.dtype, keys)) return e;
  const TensorMapShape rows{{g.columns, q_rows, 1, 1}, {g.pitch, 0, 0}, g.box_units * g.rows_per_unit, 1};
  if (cudaError_t e = MakeTensorMap(&args.q_map, scratch.q_rows, p.q.dtype, rows)) return e;
  auto in_place = [&](CUtensorMap* map, const Tensor& t, int cells, int heads, int64_t tokens, int box_heads) {
    const TensorMapShape shape{{p.head_dim, cells, heads, tokens - (cells - 1) * g.stride},
                               {g.stride * t.stride[1], t.stride[2], t.stride[1]},
                               cells,
                               box_heads};
    return MakeTensorMap(map, t.data, t.dtype, shape);
  };
  if (g.direct_q) {
    if (cudaError_t e = in_place(&args.q_direct_map, p.q, g.rows_per_unit, p.q_heads, QueryTokens(p), g.box_units)) {
      return e;
    }
  }
  return g.direct_k ? in_place(&args.k_direct_map, p.k, kKeyTileCells, p.kv_heads, KeyTokens(p), 1) : cudaSuccess;
}

} // namespace

StridedScratch StridedScratch::Take(Workspace& workspace, const Problem& p, const Policy& policy) {
  const Plan plan = Plan::Of(p, policy);
  const StridedShape& g = plan.shape;
  const int64_t parts = int64_t{plan.chunk_tiles} * p.q_heads * g.rows_per_unit * g.key_tiles;
  StridedScratch scratch{};
  scratch.k_cells = workspace.Take<uint16_t>(p.kv_heads * g.cell_rows * g.pitch);
  scratch.q_rows = workspace.Take<uint16_t>(plan.QueryRows(p) * g.pitch);
  scratch.sums = workspace.Take<uint16_t>(parts * g.block_pitch);
  scratch.stats = workspace.Take<float>(2 * parts);
  return scratch;
}

const char* StridedUnsupported(const Problem& p, const Policy& policy) {
  if (p.head_dim > 256) return "head_dim is above 256, the most that the CUDA kernels do";
  if (Method::Of(p, policy).head_thresholds && p.q_heads > kMaxGridThresholds) {
    return "head_thresholds is given for more than 512 query heads";
  }
  if (!StridedKeeps(DivUp<int64_t>(p.max_seqlen_k, policy.block_size))) {
    return "max_seqlen_k / block_size is too large for the masses of a tile to stay in shared memory: at most 58000";
  }
  return nullptr;
}

cudaError_t LaunchStrided(const Problem& p, const Policy& policy, const BlockMask& mask, const StridedScratch& scratch,
                          int* zeroed, cudaStream_t stream) {
  const Method method = Method::Of(p, policy);
  const Plan plan = Plan::Of(p, policy);
  StridedArgs grid{};
  grid.d = DeviceProblem::Of(p);
  grid.rules = TileRules::Of(p, policy);
  grid.shape = plan.shape;
  grid.k_cells = scratch.k_cells;
  grid.q_rows = scratch.q_rows;
  grid.sums = static_cast<__half*>(scratch.sums);
  grid.stats = static_cast<float2*>(scratch.stats);

  StridedScoreArgs score{};
  score.scale_log2 = method.factor * 1.44269504f;
  if (cudaError_t e = MakeMaps(p, plan.shape, scratch, plan.QueryRows(p), score)) return e;
  StridedKeepArgs keep{};
  keep.forced_first = method.forced_first;
  keep.bits = mask.bits;
  keep.counts = mask.counts;
  keep.words = mask.words;
  keep.threshold = method.threshold;
  keep.by_head = method.head_thresholds != nullptr;
  for (int h = 0; keep.by_head && h < p.q_heads; ++h) keep.head_threshold[h] = method.head_thresholds[h];

  for (int first = 0; first < grid.rules.tile_rows; first += plan.chunk_tiles) {
    grid.first_tile = first;
    grid.tiles = std::min(plan.chunk_tiles, grid.rules.tile_rows - first);
    const bool last = first + grid.tiles == grid.rules.tile_rows;
    if (cudaError_t e = LaunchStridedGather(grid, first == 0, first == 0 || !plan.shape.direct_q, stream)) return e;
    score.grid = keep.grid = grid;
    if (cudaError_t e = LaunchStridedScore(score, stream)) return e;
    keep.fallback = last ? mask.fallback : nullptr;
    keep.zeroed = last ? zeroed : nullptr;
    if (cudaError_t e = LaunchStridedKeep(keep, stream)) return e;
  }
  return cudaSuccess;
}

} // namespace flashprefill::cuda
