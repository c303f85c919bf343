// Pooling: the means of K's blocks (of V's too, for the mean correction), Sketch's outliers, mean and variance, and the
// means of runs of query rows where the score kernel does not make them itself, all in one launch.
//
// The pass is bound by memory, so it is built around loads: 16 bytes per thread, consecutive threads on consecutive
// addresses, eight loads in flight before the first is used. The two halves differ in who adds up. A key block has 128
// or so rows for one result, so the 256 threads of a CTA share them (16 rows at a time for head_dim 128) and meet in
// shared memory; 4K tokens then still make 256 CTAs. A pooled query row is 16 tokens or so, so a thread adds up its own
// eight columns of all of them without meeting another thread; neighbouring threads take neighbouring heads, so that a
// CTA reads whole rows of tokens. Sums are fp32, in an order that depends on nothing but shapes, rounded once.
//
// Sketch goes over its block twice: for the mean, then for distances and squares about it. 128 keys stay in registers
// meanwhile; of larger blocks the second pass comes from L2.
#include <limits>

#include "cuda/common/energies/pool.h"
#include "cuda/common/energies/pool_rows.cuh"
#include "cuda/common/grid_control.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/tensor_access.h"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kInFlight = 8; // loads before the first use
constexpr int kMaxBlock = 1024;
constexpr int kMaxDim = 256; // 32 threads per row

// The work of the CTAs of a launch, by number: blocks of K, blocks of V, rows of Q, and the last one writes fallbacks.
struct Jobs {
  int blocks;      // of a sequence at most
  int lanes;       // threads per row of K or V: a power of two
  int q_row_count; // pooled rows of one head in a tile
  uint32_t k_end, v_end, q_end;
  // blocks, kv_heads, page_size; CTAs for the rows of a tile, threads per row of Q (head_dim / 8), q_heads,
  // query heads per KV head, and a tile
  Divider by_blocks, by_kv, by_page, by_parts, by_chunks, by_heads, by_group, by_tile_heads;
  int q_parts, chunks;
};

struct Block {
  DeviceSequence sequence;
  int begin, keys;
  int64_t row; // of the means
  bool wanted;
};

__device__ inline Block BlockOfSlot(const PoolArgs& a, const Jobs& jobs, int slot) {
  const Problem& p = a.d.p;
  const TileRules& r = a.rules;
  const bool packed = PackedKeys(p);
  auto base = [&](int b) { return packed ? r.by_block(KeyBegin(p, b)) + b : b * jobs.blocks; }; // MeanBase
  const int b = packed ? SequenceOfSlot(p.batch, slot, base) : jobs.by_blocks(slot);
  const int index = slot - base(b);
  Block block;
  block.sequence = SequenceAt(a.d, b);
  block.begin = index * r.block_size;
  block.keys = min(r.block_size, block.sequence.k_len - block.begin);
  block.row = slot;
  block.wanted = index >= 0 && block.keys > 0 && block.sequence.q_len > 0 &&
                 !(a.skip_forced && KeepsEverything(p, r, block.sequence));
  return block;
}

// The threads of a CTA on one block of one head: `lanes` of them to a row, each with eight columns. A block of 128 keys
// and 128 columns fits in their registers at once, so a second pass over it loads nothing.
template <typename T, bool VECTOR>
struct BlockReader {
  const PoolArgs& a;
  const Jobs& jobs;
  const Tensor& tensor;
  const Block& block;
  int head;
  int group, groups; // rows group, group + groups, ... are this thread's
  int column;
  bool active;
  int batches;    // of kInFlight rows per thread
  const T* start; // of row 0, where there are no pages
  Chunk<T> held[kInFlight];

  __device__ BlockReader(const PoolArgs& args, const Jobs& j, const Tensor& t, const Block& b, int h)
      : a(args), jobs(j), tensor(t), block(b), head(h) {
    group = threadIdx.x / jobs.lanes;
    groups = kThreads / jobs.lanes;
    column = (threadIdx.x & (jobs.lanes - 1)) * kColumns;
    active = column < a.d.p.head_dim;
    batches = 1;
    while (batches * kInFlight * groups < block.keys) ++batches;
    const T* const data = static_cast<const T*>(tensor.data);
    start = a.d.p.block_table ? data : data + KeyOffsetAt(a.d.p, tensor.stride, block.sequence, block.begin, head);
  }

  __device__ const T* Row(int t) const {
    if (!a.d.p.block_table) return start + t * tensor.stride[1];
    const Problem& p = a.d.p;
    const int position = block.begin + t, index = jobs.by_page(position);
    return start + PageAt(p, block.sequence.index, index) * tensor.stride[0] +
           (position - index * p.page_size) * tensor.stride[1] + head * tensor.stride[2];
  }

  // body(first, stride), for whole warps: rows first + i * stride, i < kInFlight, are in `held` if there are such rows
  // and columns.
  template <typename Body>
  __device__ void ForBatches(bool first_pass, Body&& body) {
    for (int batch = 0; batch < batches; ++batch) {
      const int first = group + batch * kInFlight * groups;
      if (first_pass || batches > 1) {
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          const int t = first + i * groups;
          if (t < block.keys && active) {
            held[i] = LoadChunk<T, VECTOR>(Row(t), column, a.d.p.head_dim, tensor.stride[3]);
          }
        }
      }
      body(first, groups);
    }
  }
};

// Adds up one value a column over all rows' threads; thread d < 256 gets the sum of column d. Ends with a barrier
// passed.
__device__ inline float SumOverRows(float (&x)[kColumns], int lanes, float (*partial)[kMaxDim]) {
  for (int offset = lanes; offset < 32; offset *= 2) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) x[i] += __shfl_xor_sync(~0u, x[i], offset);
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane < lanes) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) partial[warp][lane * kColumns + i] = x[i];
  }
  __syncthreads();
  float sum = 0;
  if (threadIdx.x < lanes * kColumns) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partial[w][threadIdx.x];
  }
  __syncthreads();
  return sum;
}

struct PoolShared {
  float partial[kWarps][kMaxDim];
  float mean[kMaxDim];
  float weight[kMaxDim]; // of a dimension in distances
  float distance[kMaxBlock];
  int outlier[kMaxOutliers];
  alignas(16) uint16_t row[kMaxOutliers][kMaxDim]; // outliers
};

// The mean of a block. Thread d returns column d's, not rounded.
template <typename T, bool VECTOR>
__device__ float MeanOfBlock(BlockReader<T, VECTOR>& reader, PoolShared& shared) {
  float sum[kColumns] = {};
  reader.ForBatches(true, [&](int first, int stride) {
#pragma unroll
    for (int r = 0; r < kInFlight; ++r) {
      if (first + r * stride < reader.block.keys && reader.active) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) sum[i] += ToFloat(reader.held[r].value[i]);
      }
    }
  });
  return __fdiv_rn(SumOverRows(sum, reader.jobs.lanes, shared.partial), static_cast<float>(reader.block.keys));
}

template <typename T>
__device__ void StoreMean(void* means, const PoolArgs& a, int64_t row, float mean) {
  if (threadIdx.x < a.pitch) {
    static_cast<T*>(means)[row * a.pitch + threadIdx.x] = FromFloat<T>(threadIdx.x < a.d.p.head_dim ? mean : 0.f);
  }
}

// The farthest keys from the block's mean, by a warp, one after another: distances are at least 0, so they order as
// integers do; equal ones go by index; one that is no number counts as the nearest, as in the reference.
// Ranks of up to 128 keys stay in registers.
__device__ void FindOutliers(PoolShared& shared, int keys, int outliers) {
  const int lane = threadIdx.x % 32;
  constexpr int kHeld = 4;
  auto rank_of = [&](int t) { // 0: taken, or there is no such key
    const float distance = t < keys ? shared.distance[t] : -INFINITY;
    return distance == -INFINITY ? 0u : distance >= 0 ? __float_as_uint(distance) + 2 : 1u;
  };
  uint32_t rank[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) rank[i] = rank_of(lane + 32 * i);
  for (int r = 0; r < outliers; ++r) {
    uint32_t farthest = 0, at = ~0u;
    auto look = [&](uint32_t its, int t) {
      if (its > farthest) farthest = its, at = t;
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) look(rank[i], lane + 32 * i);
    for (int t = lane + 32 * kHeld; t < keys; t += 32) look(rank_of(t), t);
    const uint32_t most = __reduce_max_sync(~0u, farthest);
    const int t = static_cast<int>(__reduce_min_sync(~0u, farthest == most ? at : ~0u));
#pragma unroll
    for (int i = 0; i < kHeld; ++i) rank[i] = t == lane + 32 * i ? 0 : rank[i];
    if (lane == 0) shared.outlier[r] = t;
    if (t >= 32 * kHeld) {
      __syncwarp();
      if (lane == 0) shared.distance[t] = -INFINITY;
      __syncwarp();
    }
  }
}

// Distances of a thread's rows from the mean, of which it has summed up its own columns: the `lanes` threads of a row
// exchange halves of their rows first, so that each ends with few whole sums. Row i of kInFlight is `stride` after i
// - 1.
__device__ void StoreDistances(float (&distance)[kInFlight], int lanes, int first, int stride, int keys,
                               float* distances) {
  const int lane = threadIdx.x & (lanes - 1);
  int row = 0, whole = 0; // index of the first row that is left, and bits of lanes that have the same sums
#pragma unroll
  for (int stage = 0; stage < 5; ++stage) {
    const int offset = lanes >> (stage + 1);
    if (offset == 0) break;
    constexpr int kLeft[5] = {4, 2, 1, 0, 0};
    const int left = kLeft[stage];
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < left; ++i) {
      const float other = __shfl_xor_sync(~0u, upper ? distance[i] : distance[i + left], offset);
      distance[i] = (upper ? distance[i + left] : distance[i]) + other;
    }
    if (left > 0) {
      row += upper ? left : 0;
    } else {
      distance[0] += __shfl_xor_sync(~0u, distance[0], offset);
      whole |= offset;
    }
  }
  const int left = max(1, kInFlight / lanes);
  if (lane & whole) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = first + (row + i) * stride;
    if (i < left && t < keys) distances[t] = distance[i];
  }
}

// One more pass over the block, which sums up distances from its mean by row and by column; the outliers, once known,
// are taken out of the columns' sums again.
template <typename T, bool VECTOR, bool METRIC>
__device__ void SketchBlock(const PoolArgs& a, BlockReader<T, VECTOR>& reader, float mean, PoolShared& shared) {
  const int keys = reader.block.keys, lanes = reader.jobs.lanes;
  const int64_t plane = int64_t{a.d.p.kv_heads} * a.mean_rows * a.pitch;
  const int64_t row = reader.head * a.mean_rows + reader.block.row;
  T* const planes = static_cast<T*>(a.sketch) + row * a.pitch;
  const int outliers = min(a.outliers, keys);

  // Share the mean and the weights.
  if (threadIdx.x < lanes * kColumns) {
    shared.mean[threadIdx.x] = mean;
    if constexpr (METRIC) {
      const int64_t head = int64_t{reader.block.sequence.index} * a.d.p.kv_heads + reader.head;
      const float* const parts = a.metric + head * kMetricParts * a.pitch + threadIdx.x;
      float weight = 0;
#pragma unroll
      for (int i = 0; i < kMetricParts; ++i) weight += threadIdx.x < a.pitch ? parts[i * a.pitch] : 0.f;
      shared.weight[threadIdx.x] = weight;
    }
  }
  __syncthreads();
  // Add up distances from the mean by row, and squares by column.
  float center[kColumns], square[kColumns] = {};
#pragma unroll
  for (int i = 0; i < kColumns; ++i) center[i] = shared.mean[reader.column + i];
  reader.ForBatches(false, [&](int first, int stride) {
    float distance[kInFlight];
#pragma unroll
    for (int r = 0; r < kInFlight; ++r) {
      distance[r] = 0;
      if (first + r * stride < keys && reader.active) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const float x = ToFloat(reader.held[r].value[i]) - center[i];
          const float weighted = METRIC ? x * shared.weight[reader.column + i] : x;
          distance[r] = fmaf(x, VECTOR || reader.column + i < a.d.p.head_dim ? weighted : 0.f, distance[r]);
          square[i] = fmaf(x, x, square[i]);
        }
      }
    }
    StoreDistances(distance, lanes, first, stride, keys, shared.distance);
  });
  __syncthreads();
  // Find the outliers.
  if (threadIdx.x < 32) FindOutliers(shared, keys, outliers);
  const float squares_of_all = SumOverRows(square, lanes, shared.partial);

  // Copy the outliers. Each thread takes eight columns of one; outliers that a short block lacks are zeros.
  const int column = reader.column;
  auto put = [&](int r, const uint4& raw) {
    *reinterpret_cast<uint4*>(planes + (2 + r) * plane + column) = raw;
    *reinterpret_cast<uint4*>(shared.row[r] + column) = raw;
  };
  const bool holds_all = reader.batches == 1;
  for (int r = 0; holds_all && r < outliers; ++r) { // the threads that have its row
    const int from_group = shared.outlier[r] - reader.group;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (from_group == i * reader.groups && reader.active) put(r, reader.held[i].raw);
    }
  }
  for (int r = (holds_all ? outliers : 0) + reader.group; r < a.outliers && column < a.pitch; r += reader.groups) {
    Chunk<T> chunk;
    chunk.raw = uint4{0, 0, 0, 0};
    if (r < outliers) {
      chunk = LoadChunk<T, VECTOR>(reader.Row(shared.outlier[r]), column, a.d.p.head_dim, reader.tensor.stride[3]);
    }
    put(r, chunk.raw);
  }
  __syncthreads();
  // Take the outliers out of mean and variance.
  if (threadIdx.x < a.pitch) {
    float offset = 0, squares = squares_of_all; // about the mean all keys together have no offset
    for (int r = 0; r < outliers; ++r) {
      const float x = ToFloat(reinterpret_cast<const T*>(shared.row[r])[threadIdx.x]) - mean;
      offset -= x;
      squares -= x * x;
    }
    const float rest = static_cast<float>(keys - outliers);
    const float shift = rest > 0 ? __fdiv_rn(offset, rest) : 0.f;
    const bool real = threadIdx.x < a.d.p.head_dim && rest > 0;
    const float variance = real ? __fdiv_rn(squares, rest) - shift * shift : 0.f;
    planes[threadIdx.x] = FromFloat<T>(real ? mean + shift : 0.f);
    planes[plane + threadIdx.x] = FromFloat<T>(variance < 0 ? 0.f : variance); // NaN stays
  }
}

template <typename T, bool VECTOR, bool SKETCH, bool METRIC>
__device__ void PoolKeys(const PoolArgs& a, const Jobs& jobs, uint32_t job, bool of_v) {
  __shared__ PoolShared shared;
  const int slot = jobs.by_kv(static_cast<int>(job)), head = static_cast<int>(job) - slot * a.d.p.kv_heads;
  const Block block = BlockOfSlot(a, jobs, slot);
  if (!block.wanted) return;
  BlockReader<T, VECTOR> reader(a, jobs, of_v ? a.d.p.v : a.d.p.k, block, head);
  const float mean = MeanOfBlock<T, VECTOR>(reader, shared);
  void* const means = of_v ? a.v_means : a.k_means;
  const int64_t row = head * a.mean_rows + block.row;
  if (means) StoreMean<T>(means, a, row, mean);
  if (!of_v && a.k_floats && threadIdx.x < a.pitch) a.k_floats[row * a.pitch + threadIdx.x] = mean;
  if constexpr (SKETCH) {
    if (!of_v) SketchBlock<T, VECTOR, METRIC>(a, reader, mean, shared);
  }
}

// One thread: eight columns of one pooled row.
template <typename T, bool VECTOR>
__device__ void PoolQueries(const PoolArgs& a, const Jobs& jobs, uint32_t job) {
  const Problem& p = a.d.p;
  const TileRules& r = a.rules;
  const int tile_row = jobs.by_parts(static_cast<int>(job));
  const int index = (static_cast<int>(job) - tile_row * jobs.q_parts) * kThreads + threadIdx.x;
  const int row_index = jobs.by_chunks(index), column = (index - row_index * jobs.chunks) * kColumns;
  const int j = jobs.by_heads(row_index), head = row_index - j * p.q_heads;
  if (j >= jobs.q_row_count) return;
  const int b = SequenceOfSlot(p.batch, tile_row, [&](int i) { return TileBaseOf(a.d, r, i); });
  const DeviceSequence s = SequenceAt(a.d, b);
  const int m = tile_row - s.TileBase(r);
  if (m < 0 || m >= FirstDenseTile(r, s) || (a.skip_forced && KeepsEverything(p, r, s))) return;
  const DeviceTile tile = TileAt(p, r, s, m);
  const int begin = tile.begin + j * a.query_pool;
  const int tokens = min(a.query_pool, tile.end - begin);
  if (tokens <= 0) return;

  float mean[kColumns];
  const T* const rows = static_cast<const T*>(p.q.data) + RowOffsetAt(p, p.q.stride, s, begin, head);
  MeanOfRows<T, VECTOR>(rows, p.q.stride[1], tokens, column, p.head_dim, p.q.stride[3], mean);

  const int group = r.heads_per_tile * r.units_per_kv;
  const int kv = jobs.by_group(head), in_group = head - kv * group;
  const int unit = jobs.by_tile_heads(in_group), in_tile = in_group - unit * r.heads_per_tile;
  const int64_t units = int64_t{p.kv_heads} * r.tile_rows * r.units_per_kv;
  const int64_t row =
      ((int64_t{kv} * r.tile_rows + tile_row) * r.units_per_kv + unit) * a.unit_rows + j * r.heads_per_tile + in_tile;
  T* const to = static_cast<T*>(a.q_rows) + row * a.pitch + column;
  *reinterpret_cast<uint4*>(to) = Rounded<T>(mean);
  if (a.squares) {
    ScaledSquares<T>(mean, a.square_scale);
    *reinterpret_cast<uint4*>(to + units * a.unit_rows * a.pitch) = Rounded<T>(mean);
  }
}

__device__ void WriteFallbacks(const PoolArgs& a) {
  if (a.attend_counter && threadIdx.x == 0) *a.attend_counter = 0;
  for (int b = threadIdx.x; a.fallback && b < a.d.p.batch; b += kThreads) {
    a.fallback[b] = FallbackOf(a.d, a.rules, SequenceAt(a.d, b));
  }
}

// Four CTAs of 64 registers per thread on a multiprocessor, three of 80 where more is held at a time.
template <typename T, bool VECTOR, bool SKETCH, bool METRIC>
__global__ void __launch_bounds__(kThreads, METRIC || !VECTOR ? 3 : 4)
    PoolKernel(const __grid_constant__ PoolArgs a, const __grid_constant__ Jobs jobs) {
  GridWait();    // launched before the kernel that comes before it has ended
  GridRelease(); // the score kernel may take its place as soon as there is room
  const uint32_t job = blockIdx.x;
  if (job < jobs.k_end) {
    PoolKeys<T, VECTOR, SKETCH, METRIC>(a, jobs, job, false);
  } else if (job < jobs.v_end) {
    PoolKeys<T, VECTOR, SKETCH, METRIC>(a, jobs, job - jobs.k_end, true);
  } else if (job < jobs.q_end) {
    PoolQueries<T, VECTOR>(a, jobs, job - jobs.v_end);
  } else {
    WriteFallbacks(a);
  }
}

template <typename T>
auto KernelOf(bool vector, bool sketch, bool metric) {
  if (metric) return vector ? PoolKernel<T, true, true, true> : PoolKernel<T, false, true, true>;
  return vector ? (sketch ? PoolKernel<T, true, true, false> : PoolKernel<T, true, false, false>)
                : (sketch ? PoolKernel<T, false, true, false> : PoolKernel<T, false, false, false>);
}

} // namespace

const char* PoolUnsupported(int head_dim) {
  return head_dim > kMaxDim ? "head_dim is above 256, the most that the CUDA kernels do" : nullptr;
}

cudaError_t LaunchPool(const PoolArgs& args, cudaStream_t stream) {
  const Problem& p = args.d.p;
  Jobs jobs{};
  jobs.chunks = DivUp(p.head_dim, kColumns);
  for (jobs.lanes = 4; jobs.lanes < jobs.chunks;) jobs.lanes *= 2;
  jobs.q_row_count = DivUp(args.rules.tile_tokens, args.query_pool);
  jobs.q_parts = DivUp(jobs.q_row_count * p.q_heads * jobs.chunks, kThreads);
  jobs.blocks = static_cast<int>(DivUp<int64_t>(p.max_seqlen_k, args.rules.block_size));
  jobs.by_blocks = Divider::Of(std::max(1, jobs.blocks));
  jobs.by_kv = Divider::Of(p.kv_heads);
  jobs.by_page = Divider::Of(std::max(1, p.page_size));
  jobs.by_parts = Divider::Of(jobs.q_parts);
  jobs.by_chunks = Divider::Of(jobs.chunks);
  jobs.by_heads = Divider::Of(p.q_heads);
  jobs.by_group = Divider::Of(p.q_heads / p.kv_heads);
  jobs.by_tile_heads = Divider::Of(args.rules.heads_per_tile);
  const bool keys = args.k_means || args.sketch;
  const int64_t blocks = args.mean_rows * p.kv_heads;
  const int64_t tiles = args.q_rows ? int64_t{args.rules.tile_rows} * jobs.q_parts : 0;
  const int64_t grid =
      (keys ? blocks : 0) + (args.v_means ? blocks : 0) + tiles + (args.fallback || args.attend_counter ? 1 : 0);
  if (grid == 0) return cudaSuccess;
  if (grid > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  jobs.k_end = static_cast<uint32_t>(keys ? blocks : 0);
  jobs.v_end = static_cast<uint32_t>(jobs.k_end + (args.v_means ? blocks : 0));
  jobs.q_end = static_cast<uint32_t>(jobs.v_end + tiles);

  const bool vector = p.head_dim % kColumns == 0 && (!args.q_rows || ReadsBy16Bytes(p.q)) &&
                      (!keys || ReadsBy16Bytes(p.k)) && (!args.v_means || ReadsBy16Bytes(p.v));
  const bool bf16 = p.k.dtype == FP_BF16, sketch = args.sketch != nullptr, metric = args.metric != nullptr;
  const auto kernel = bf16 ? KernelOf<__nv_bfloat16>(vector, sketch, metric) : KernelOf<__half>(vector, sketch, metric);
  // Sketch's pass is long enough to be launched early. CTAs then crowd on the multiprocessors that are free first: good
  // where there are several for each place.
  int processors = 0;
  if (cudaError_t e = CountProcessors(&processors)) return e;
  return LaunchOverlapped(kernel, sketch && grid >= 7 * processors, grid, kThreads, 0, stream, args, jobs);
}

} // namespace flashprefill::cuda
