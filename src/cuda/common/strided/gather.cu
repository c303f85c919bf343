// Cells of keys and rows of queries as two matrices, so that the score kernel is a plain product of them, whatever the
// layout, the pages and the lengths are: past the end of a sequence there are zeros. XAttention's cells
// are copied as they are, token after token, and its rows from the cell's last query to its first; RRAttention's cells
// are averaged and its rows are single queries.
//
// A CTA takes 32 KiB of one matrix, eight rows at stride 16 and head_dim 128, of neighbouring heads. Consecutive
// threads copy consecutive 16 bytes of a row, eight of them in flight each; head_dim 128 makes runs of 256 bytes in the
// cache and whole rows in the matrix.
#include <limits>

#include "cuda/common/grid_control.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/numbers.cuh"
#include "cuda/common/strided/cells.cuh"
#include "cuda/common/tensor_access.h"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostRows = 64; // of a CTA
constexpr int kInFlight = 8;

struct GatherJobs {
  int rows;           // of a CTA
  int64_t keys;       // CTAs for keys; the others are for queries
  int pieces_per_row; // of the matrix
  int pieces_per_token;
  Divider by_kv, by_heads, by_group, by_row, by_token, by_page;
};

// One row of a matrix: where it comes from, and where it goes.
struct GatherRow {
  DeviceSequence sequence;
  int head;
  int begin, end; // tokens [begin, end) of the cell
  int single;     // RRAttention's query, as a token
  int64_t to;     // row of the matrix
  bool wanted;
};

// Rows are numbered head by head, then cell by cell.
__device__ GatherRow KeyRow(const StridedArgs& a, const GatherJobs& jobs, int number) {
  const Problem& p = a.d.p;
  const StridedShape& g = a.shape;
  auto base = [&](int b) {
    if (g.direct_k) return b * kKeyTileCells;
    return static_cast<int>(MeanBase(PackedKeys(p), b, KeyBegin(p, b), p.max_seqlen_k, g.stride));
  };
  const int slot = jobs.by_kv(number), b = SequenceOfSlot(p.batch, slot, base);
  GatherRow row;
  row.head = number - slot * p.kv_heads;
  row.sequence = SequenceAt(a.d, b);
  int cell = slot - base(b);
  if (g.direct_k) cell += (row.sequence.k_len >> g.log2_stride) / kKeyTileCells * kKeyTileCells;
  row.begin = cell << g.log2_stride;
  row.end = min(row.begin + g.stride, row.sequence.k_len);
  row.to = row.head * g.cell_rows + slot;
  row.wanted = slot < g.cell_rows && cell >= 0 && row.begin < row.end && row.sequence.q_len > 0 &&
               !KeepsEverything(p, a.rules, row.sequence);
  return row;
}

__device__ GatherRow QueryRow(const StridedArgs& a, const GatherJobs& jobs, int number) {
  const Problem& p = a.d.p;
  const StridedShape& g = a.shape;
  const TileRules& r = a.rules;
  const int in_head = jobs.by_heads(number), head = number - in_head * p.q_heads, kv = jobs.by_group(head);
  const int q_tile = in_head >> g.log2_rows, i = in_head & (g.rows_per_unit - 1), slot = a.first_tile + q_tile;
  const int b = g.direct_q ? min(q_tile, p.batch - 1)
                           : SequenceOfSlot(p.batch, slot, [&](int j) { return TileBaseOf(a.d, r, j); });
  GatherRow row;
  row.head = head;
  row.sequence = SequenceAt(a.d, b);
  const int tiles = row.sequence.Tiles(r), m = g.direct_q ? tiles - 1 : slot - row.sequence.TileBase(r);
  row.wanted =
      q_tile < g.q_tiles && m >= 0 && m < FirstDenseTile(r, row.sequence) && !KeepsEverything(p, r, row.sequence);
  if (!row.wanted) return row;
  const DeviceTile tile = TileAt(p, r, row.sequence, m);
  row.begin = tile.begin + (i << g.log2_stride);
  row.end = min(row.begin + g.stride, tile.end);
  row.single = LastQuery(g, tile, i, head);
  const int64_t unit = (kv * g.q_tiles + q_tile) * r.units_per_kv + head - kv * r.units_per_kv;
  row.to = unit * g.rows_per_unit + i;
  row.wanted = row.begin < row.end && !(g.direct_q && tile.end - tile.begin == r.tile_tokens);
  return row;
}

// WIDTH neighbouring columns: 16 bytes where addresses allow it, else one.
template <typename T, int WIDTH>
struct alignas(WIDTH * sizeof(T)) Piece {
  T value[WIDTH];
};

template <typename T, int WIDTH>
__global__ void __launch_bounds__(kThreads)
    GatherKernel(const __grid_constant__ StridedArgs a, const __grid_constant__ GatherJobs jobs) {
  using P = Piece<T, WIDTH>;
  __shared__ GatherRow rows[kMostRows];
  GridRelease(); // the score kernel may take its place as soon as there is room
  GridWait();    // and the last chunk's must be done with the rows
  const Problem& p = a.d.p;
  const StridedShape& g = a.shape;
  // Place the CTA's rows.
  const bool keys = blockIdx.x < jobs.keys;
  if (threadIdx.x < jobs.rows) {
    const int number = static_cast<int>(keys ? blockIdx.x : blockIdx.x - jobs.keys) * jobs.rows + threadIdx.x;
    rows[threadIdx.x] = keys ? KeyRow(a, jobs, number) : QueryRow(a, jobs, number);
  }
  __syncthreads();

  auto address = [&](const GatherRow& row, int token, int column) -> const P* {
    const DeviceSequence& s = row.sequence;
    const Tensor& tensor = keys ? p.k : p.q;
    int64_t offset;
    if (!keys) {
      offset = RowOffsetAt(p, tensor.stride, s, token, row.head);
    } else if (p.block_table) {
      const int index = jobs.by_page(token);
      offset = PageAt(p, s.index, index) * tensor.stride[0] + (token - index * p.page_size) * tensor.stride[1] +
               row.head * tensor.stride[2];
    } else {
      offset = KeyOffsetAt(p, tensor.stride, s, token, row.head);
    }
    return reinterpret_cast<const P*>(static_cast<const T*>(tensor.data) + offset + column * tensor.stride[3]);
  };
  T* const matrix = static_cast<T*>(keys ? a.k_cells : a.q_rows);

  const int pieces = jobs.rows * jobs.pieces_per_row;

  // Average cells of keys: a thread adds up its columns of all keys of a cell.
  if (keys && g.means) {
    for (int index = threadIdx.x; index < pieces; index += kThreads) {
      const int r = jobs.by_row(index), column = (index - r * jobs.pieces_per_row) * WIDTH;
      const GatherRow& row = rows[r];
      if (!row.wanted) continue;
      float sum[WIDTH] = {};
      for (int first = row.begin; first < row.end; first += kInFlight) {
        P piece[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (first + k < row.end) piece[k] = *address(row, first + k, column);
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) sum[i] += first + k < row.end ? ToFloat(piece[k].value[i]) : 0.f;
        }
      }
      P mean;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        mean.value[i] = FromFloat<T>(__fdiv_rn(sum[i], static_cast<float>(row.end - row.begin)));
      }
      *reinterpret_cast<P*>(matrix + row.to * g.pitch + column) = mean;
    }
    return;
  }

  // Copy everything else.
  for (int first = threadIdx.x; first < pieces; first += kThreads * kInFlight) {
    P piece[kInFlight];
    P* to[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int index = first + k * kThreads;
      const int r = jobs.by_row(index), in_row = index - r * jobs.pieces_per_row;
      to[k] = nullptr;
      if (r >= jobs.rows || !rows[r].wanted) continue;
      const GatherRow& row = rows[r];
      const int t = jobs.by_token(in_row), column = (in_row - t * jobs.pieces_per_token) * WIDTH;
      const int token = g.means ? row.single : keys ? row.begin + t : row.begin + g.stride - 1 - t;
      to[k] = reinterpret_cast<P*>(matrix + row.to * g.pitch + in_row * WIDTH);
      piece[k] = P{};
      if (token < row.end) piece[k] = *address(row, token, column);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (to[k]) *to[k] = piece[k];
    }
  }
}

} // namespace

cudaError_t LaunchStridedGather(const StridedArgs& args, bool keys, bool queries, cudaStream_t stream) {
  const Problem& p = args.d.p;
  const StridedShape& g = args.shape;
  const bool vector = p.head_dim % 8 == 0 && ReadsBy16Bytes(p.q) && ReadsBy16Bytes(p.k);
  GatherJobs jobs{};
  jobs.pieces_per_token = vector ? p.head_dim / 8 : p.head_dim;
  jobs.pieces_per_row = g.means ? jobs.pieces_per_token : g.stride * jobs.pieces_per_token;
  jobs.rows = std::clamp(kThreads * kInFlight / jobs.pieces_per_row, 1, kMostRows);
  jobs.by_kv = Divider::Of(p.kv_heads);
  jobs.by_heads = Divider::Of(p.q_heads);
  jobs.by_group = Divider::Of(args.rules.units_per_kv);
  jobs.by_row = Divider::Of(jobs.pieces_per_row);
  jobs.by_token = Divider::Of(jobs.pieces_per_token);
  jobs.by_page = Divider::Of(std::max(1, p.page_size));
  jobs.keys = keys ? DivUp<int64_t>(g.cell_rows * p.kv_heads, jobs.rows) : 0;
  const int64_t q_rows = g.q_tiles * g.rows_per_unit * p.q_heads;
  const int64_t grid = jobs.keys + (queries ? DivUp<int64_t>(q_rows, jobs.rows) : 0);
  if (grid == 0) return cudaSuccess;
  if (grid > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const auto kernel = p.q.dtype == FP_BF16 ? (vector ? GatherKernel<__nv_bfloat16, 8> : GatherKernel<__nv_bfloat16, 1>)
                                           : (vector ? GatherKernel<__half, 8> : GatherKernel<__half, 1>);
  // The kernel before the first chunk is not of this family, and may not let another one start early.
  return LaunchOverlapped(kernel, !keys, grid, kThreads, 0, stream, args, jobs);
}

} // namespace flashprefill::cuda
