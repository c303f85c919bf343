// Scores of strips of rows against key tiles of cells, their powers of two, and what is kept of them: for each row and
// key tile the largest exponent and the sum, for each row and block the sum relative to it. A row's softmax needs its
// sum over all keys, which no CTA sees; with these, grid_keep.cu makes shares of a whole row without a second product.
//
// It is a matrix product as those of textbooks: 128 rows times 256 cells over columns of stride * head_dim, 32 steps of
// 64 columns at stride 16 and head_dim 128. Two math warpgroups have 64 rows each and read the same cells; a producer
// warp keeps a ring of stages full. What comes after a product is done once every 32 steps: a twentieth of the time.
//
// Strips and key tiles that causality leaves are numbered by every producer for itself, in groups of 32 strips of one
// KV head, key tile after key tile, and CTA c takes the numbers c, c + CTAs, ... So all CTAs get the same number of
// equal pieces whatever the lengths are, no counter is in memory, and neighbours in time share strips and cells in L2.
#include <cuda_bf16.h>

#include "cuda/attend.h"
#include "cuda/common/wgmma.cuh"
#include "cuda/sm90/grid.cuh"

namespace flashprefill::cuda {
namespace {

constexpr int kGroups = 2; // math warpgroups, of 64 rows each
constexpr int kThreads = 128 * kGroups + 128;
constexpr int kPanel = 64; // columns a step: 128 bytes a row
constexpr int kRowBytes = 128;
constexpr int kRowsStage = kStripRows * kRowBytes;
constexpr int kStage = kRowsStage + kKeyTileCells * kRowBytes;
constexpr int kMostStages = 4;
constexpr int kItems = 2; // work that the producer is ahead
constexpr int kWarpRows = 16;
constexpr int kGroupStrips = 32; // a lane of the producer warp each

// One strip. key_tiles is 0 where nothing is to be scored.
struct Strip {
  DeviceSequence sequence;
  int kv;
  int first_tile; // of the sequence, in the chunk
  int local_tile; // that tile in the chunk
  int unit;       // the strip's first, counted from that tile
  int units;
  int key_tiles;
};

struct Item {
  Strip strip;
  int key_tile;
  bool end; // no more work
};

struct Control {
  uint64_t full[kMostStages], empty[kMostStages], item_full[kItems], item_empty[kItems];
  Item item[kItems];
  Strip strips[kGroupStrips];
};

struct ScorePlan {
  int steps, stages;
  int slots;          // strips of a KV head, at most
  int staging_row;    // bytes a row
  bool whole_groups;  // a block is a multiple of 8 cells
  Divider by_groups;  // groups of strips a KV head
  Divider by_columns; // head_dim
};

// Where a ring of stages stands: the next stage, and how often (mod 2) it has been round.
struct Ring {
  int stage = 0;
  uint32_t round = 0;

  __device__ void Advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      round ^= 1;
    }
  }
};

// Strips of a sequence begin at (its first unit in the chunk) / units a strip + b, which leaves room for all of them
// without prefix sums.
__device__ Strip StripAt(const GridArgs& a, int kv, int slot) {
  const TileRules& r = a.rules;
  const GridShape& g = a.shape;
  auto base = [&](int b) {
    const int tile = min(max(TileBaseOf(a.d, r, b) - a.first_tile, 0), a.tiles);
    return ((tile * r.units_a_kv) >> g.log2_stride) + b;
  };
  const int b = SequenceOfSlot(a.d.p.batch, slot, base);
  Strip strip;
  strip.sequence = SequenceAt(a.d, b);
  const GridShare share = ShareOf(a, strip.sequence);
  strip.kv = kv;
  strip.first_tile = share.first_tile;
  strip.local_tile = share.local_tile;
  strip.unit = (slot - base(b)) << g.log2_stride;
  strip.units = min(g.stride, share.units - strip.unit);
  strip.key_tiles = 0;
  if (strip.unit < 0 || strip.units <= 0 || AllForcedAt(a.d.p, r, strip.sequence)) return strip;
  const int last =
      min(share.first_tile + r.by_units(strip.unit + strip.units - 1), FirstDenseTile(r, strip.sequence) - 1);
  if (last < share.first_tile + r.by_units(strip.unit)) return strip;
  strip.key_tiles = KeyTilesSeen(g, strip.sequence, TileAt(a.d.p, r, strip.sequence, last));
  return strip;
}

// The producer warp.
__device__ void Produce(const GridScoreArgs& args, const ScorePlan& plan, char* shared, Control& c) {
  const GridArgs& a = args.grid;
  const GridShape& g = a.shape;
  const TileRules& r = a.rules;
  const Problem& p = a.d.p;
  const int lane = threadIdx.x % 32;
  Ring ring, items;

  auto hand_over = [&](const Strip& strip, int key_tile, bool end) {
    BarrierWait(&c.item_empty[items.stage], items.round ^ 1);
    if (lane == 0) {
      c.item[items.stage] = Item{strip, key_tile, end};
      BarrierArrive(&c.item_full[items.stage]);
    }
    items.Advance(kItems);
    __syncwarp();
  };

  auto load = [&](const Strip& strip, int key_tile) {
    const DeviceSequence& s = strip.sequence;
    const bool packed = p.cu_seqlens_k && !p.block_table;
    const int64_t first_key = (int64_t{key_tile} * g.key_tile_cells) << g.log2_stride;
    const bool whole = g.direct_k && first_key + (kKeyTileCells << g.log2_stride) <= s.k_len;
    const int64_t base = g.direct_k ? s.index * kKeyTileCells
                                    : MeanBase(packed, s.index, s.k_begin, p.max_seqlen_k, g.stride) +
                                          int64_t{key_tile} * g.key_tile_cells;
    const int cell = static_cast<int>(whole ? (packed ? s.k_begin : s.index * p.max_seqlen_k) + first_key
                                            : strip.kv * g.cell_rows + base);
    const int boxes = (strip.units + g.box_units - 1) / g.box_units;
    const int box_bytes = g.box_units * g.rows_a_unit * kRowBytes;
    // Where the boxes of this lane come from: a tile in q itself, or rows of the copy. 32 lanes take up to 128 boxes.
    constexpr int kBoxes = 4;
    int row[kBoxes], head[kBoxes];
    bool direct[kBoxes];
#pragma unroll
    for (int k = 0; k < kBoxes; ++k) {
      const int box = lane + 32 * k;
      if (box >= boxes) break;
      const int unit = strip.unit + box * g.box_units, in_share = r.by_units(unit);
      const int in_tile = unit - in_share * r.units_a_kv;
      const DeviceTile tile = TileAt(p, r, s, strip.first_tile + in_share);
      direct[k] = g.direct_q && tile.end - tile.begin == r.tile_tokens;
      head[k] = strip.kv * r.units_a_kv + in_tile;
      const int q_tile = g.direct_q ? s.index : strip.local_tile + in_share;
      row[k] = direct[k] ? s.q_begin + tile.begin + g.stride - 1
                         : static_cast<int>(((strip.kv * g.q_tiles + q_tile) * r.units_a_kv + in_tile) * g.rows_a_unit);
    }
    for (int step = 0; step < plan.steps; ++step) {
      uint64_t* const full = &c.full[ring.stage];
      char* const stage = shared + ring.stage * kStage;
      BarrierWait(&c.empty[ring.stage], ring.round ^ 1);
      if (lane == 0) BarrierArriveExpect(full, boxes * box_bytes + kKeyTileCells * kRowBytes);
      __syncwarp();
      const int column = step * kPanel;
      const int t = plan.by_columns(column);
#pragma unroll
      for (int k = 0; k < kBoxes; ++k) {
        const int box = lane + 32 * k;
        if (box >= boxes) break;
        char* const to = stage + box * box_bytes;
        if (direct[k]) {
          BulkLoad(to, &args.q_direct_map, full, column - t * p.head_dim, 0, head[k], row[k] - t);
        } else {
          BulkLoad(to, &args.q_map, full, column, row[k], 0, 0);
        }
      }
      if (lane == 31) {
        char* const to = stage + kRowsStage;
        if (whole) {
          BulkLoad(to, &args.k_direct_map, full, column - t * p.head_dim, 0, strip.kv, cell + t);
        } else {
          BulkLoad(to, &args.k_map, full, column, cell, 0, 0);
        }
      }
      ring.Advance(plan.stages);
    }
    __syncwarp();
  };

  const int groups = (plan.slots + kGroupStrips - 1) / kGroupStrips;
  int mine = blockIdx.x; // the next piece of this CTA
  int count = 0;         // pieces of the groups and key tiles so far
  for (int group = 0; group < groups * p.kv_heads; ++group) {
    const int kv = plan.by_groups(group);
    const int slot = (group - kv * groups) * kGroupStrips + lane;
    Strip strip{};
    if (slot < plan.slots) strip = StripAt(a, kv, slot);
    __syncwarp();
    c.strips[lane] = strip;
    __syncwarp();
    const int most = __reduce_max_sync(~0u, strip.key_tiles);
    for (int key_tile = 0; key_tile < most; ++key_tile) {
      const uint32_t who = __ballot_sync(~0u, strip.key_tiles > key_tile);
      const int pieces = __popc(who);
      for (; mine < count + pieces; mine += gridDim.x) {
        const Strip& one = c.strips[__fns(who, 0, mine - count + 1)];
        hand_over(one, key_tile, false);
        load(one, key_tile);
      }
      count += pieces;
    }
  }
  hand_over(Strip{}, 0, true);
}

// A math warpgroup's 64 rows.
template <typename T>
struct Scorer {
  const GridScoreArgs& args;
  const ScorePlan& plan;
  char* shared;
  Control& c;
  char* staging; // of this warp
  int group, warp, lane;
  Ring ring;

  __device__ __forceinline__ void Release(int stage) const {
    if (lane == 0) BarrierArrive(&c.empty[stage]);
  }

  // scores = 64 rows times 256 cells.
  __device__ __forceinline__ void Multiply(float (&scores)[kKeyTileCells / 2]) {
    int before = 0;
    for (int step = 0; step < plan.steps; ++step) {
      const uint32_t stage = SharedAddress(shared + ring.stage * kStage);
      const uint64_t rows = DescribeKMajor(stage + group * 64 * kRowBytes), cells = DescribeKMajor(stage + kRowsStage);
      BarrierWait(&c.full[ring.stage], ring.round);
      WgmmaFence();
#pragma unroll
      for (int slice = 0; slice < 4; ++slice) { // 16 columns: 32 bytes; addresses count in units of 16
        Wgmma<T>::SS(scores, rows + slice * 2, cells + slice * 2, step + slice > 0);
      }
      WgmmaCommit();
      if (step > 0) {
        WgmmaWait<1>();
        Release(before);
      }
      before = ring.stage;
      ring.Advance(plan.stages);
    }
    WgmmaWait<0>();
    Release(before);
    KeepInPlace(scores);
  }

  // Powers of two of one of the two rows of a thread, relative to the row's largest exponent; returns that and, in all
  // four lanes of the row, their sum. The row sees columns [0, seen) of the key tile. What is not finite counts as
  // nothing.
  template <int HALF>
  __device__ __forceinline__ float2 Exponentials(float (&scores)[kKeyTileCells / 2], int seen) const {
    const int mine = seen - 2 * (lane % 4);
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kKeyTileCells / 4; ++i) {
      float& z = scores[4 * (i / 2) + 2 * HALF + i % 2];
      z *= args.scale_log2;
      if (!(fabsf(z) < INFINITY) || 8 * (i / 2) + i % 2 >= mine) z = -INFINITY;
      largest = fmaxf(largest, z);
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    const float base = largest == -INFINITY ? 0.f : largest;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kKeyTileCells / 4; ++i) {
      float& z = scores[4 * (i / 2) + 2 * HALF + i % 2];
      z = Exp2(z - base);
      sum += z;
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    return {largest, sum};
  }

  // Sums by block, of rows lane / 4 and 8 on, where a block is whole groups of 8 columns: in the thread, then over the
  // four lanes of a row. They end in shared memory, a row of block_pitch of them for each of the warp's rows.
  template <int HALF>
  __device__ __forceinline__ void BlockSums(const float (&scores)[kKeyTileCells / 2]) const {
    __half* const row = reinterpret_cast<__half*>(staging + (lane / 4 + 8 * HALF) * plan.staging_row);
    const int groups_a_block = args.grid.shape.cells_a_block / 8;
    float sum = 0;
    int left = groups_a_block, block = 0;
#pragma unroll
    for (int k = 0; k < kKeyTileCells / 8; ++k) {
      sum += scores[4 * k + 2 * HALF] + scores[4 * k + 2 * HALF + 1];
      if (--left == 0) {
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (lane % 4 == block % 4) row[block] = __float2half_rn(sum);
        left = groups_a_block;
        sum = 0;
        ++block;
      }
    }
  }

  // For blocks of any number of cells all powers go to shared memory instead.
  template <int HALF>
  __device__ __forceinline__ void AllPowers(const float (&scores)[kKeyTileCells / 2]) const {
    char* const row = staging + (lane / 4 + 8 * HALF) * plan.staging_row;
#pragma unroll
    for (int k = 0; k < kKeyTileCells / 8; ++k) {
      reinterpret_cast<__half2*>(row)[4 * k + lane % 4] =
          __floats2half2_rn(scores[4 * k + 2 * HALF], scores[4 * k + 2 * HALF + 1]);
    }
  }

  // Sums of eight blocks of a row of powers.
  __device__ __forceinline__ uint4 EightSums(const char* row, int first_block) const {
    const GridShape& g = args.grid.shape;
    alignas(16) __half sums[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float sum = 0;
      const int block = first_block + j;
      const __half* const cells = reinterpret_cast<const __half*>(row) + block * g.cells_a_block;
      for (int i = 0; i < (block < g.key_tile_blocks ? g.cells_a_block : 0); ++i) sum += __half2float(cells[i]);
      sums[j] = __float2half_rn(sum);
    }
    return *reinterpret_cast<const uint4*>(sums);
  }

  __device__ __forceinline__ void Finish(float (&scores)[kKeyTileCells / 2], const Item& item) const {
    const GridArgs& a = args.grid;
    const GridShape& g = a.shape;
    const TileRules& r = a.rules;
    const Strip& strip = item.strip;
    const int first_dense = FirstDenseTile(r, strip.sequence);
    const int units = r.units_a_kv, first_row = 64 * group + kWarpRows * warp;
    // Rows of the strip that are scored come first: units in use, and of those the ones before the dense tail.
    const int live_units = min(strip.units, (first_dense - strip.first_tile) * units - strip.unit);
    const int live_rows = (live_units << g.log2_rows) - first_row; // of this warp
    const int64_t row =
        ((int64_t{strip.kv} * a.tiles + strip.local_tile) * units + strip.unit) * g.rows_a_unit + first_row;

    int seen[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int in_warp = lane / 4 + 8 * half, in_strip = first_row + in_warp;
      const int unit = strip.unit + (in_strip >> g.log2_rows), in_share = r.by_units(unit);
      const DeviceTile tile = TileAt(a.d.p, r, strip.sequence, strip.first_tile + in_share);
      const int head = strip.kv * units + unit - in_share * units;
      const int limit =
          in_warp < live_rows ? RowLimit(g, strip.sequence, tile, in_strip & (g.rows_a_unit - 1), head) : 0;
      seen[half] = min(limit - item.key_tile * g.key_tile_cells, g.key_tile_cells);
    }
    const float2 stats[2] = {Exponentials<0>(scores, seen[0]), Exponentials<1>(scores, seen[1])};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int in_warp = lane / 4 + 8 * half;
      if (lane % 4 == 0 && in_warp < live_rows) a.stats[(row + in_warp) * g.key_tiles + item.key_tile] = stats[half];
    }
    __syncwarp(); // the staging memory has been read
    if (plan.whole_groups) {
      BlockSums<0>(scores);
      BlockSums<1>(scores);
    } else {
      AllPowers<0>(scores);
      AllPowers<1>(scores);
    }
    __syncwarp();
    const int pieces = g.block_pitch / 8; // of 16 bytes a row
    for (int i = lane; i < min(live_rows, kWarpRows) * pieces; i += 32) {
      const int in_warp = i / pieces, piece = i - in_warp * pieces;
      const char* const from = staging + in_warp * plan.staging_row;
      const uint4 sums =
          plan.whole_groups ? *reinterpret_cast<const uint4*>(from + 16 * piece) : EightSums(from, 8 * piece);
      *reinterpret_cast<uint4*>(a.sums + ((row + in_warp) * g.key_tiles + item.key_tile) * g.block_pitch + 8 * piece) =
          sums;
    }
  }

  __device__ void Run() {
    Ring items;
    float scores[kKeyTileCells / 2];
    for (;;) {
      BarrierWait(&c.item_full[items.stage], items.round);
      const Item& item = c.item[items.stage];
      if (item.end) return;
      Multiply(scores);
      Finish(scores, item);
      __syncwarp();
      if (lane == 0) BarrierArrive(&c.item_empty[items.stage]);
      items.Advance(kItems);
    }
  }
};

__host__ __device__ inline int StagingBytes(const ScorePlan& plan) {
  return 4 * kGroups * kWarpRows * plan.staging_row;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    ScoreKernel(const __grid_constant__ GridScoreArgs args, const __grid_constant__ ScorePlan plan) {
  extern __shared__ char raw[];
  char* const shared = raw + (1024 - SharedAddress(raw) % 1024) % 1024;
  char* const staging = shared + plan.stages * kStage;
  Control& c = *reinterpret_cast<Control*>(staging + StagingBytes(plan));
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0); // the compiler sees that a warp agrees

  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.stages; ++i) {
      BarrierInit(&c.full[i], 1);
      BarrierInit(&c.empty[i], 4 * kGroups); // an arrival a warp
    }
    for (int i = 0; i < kItems; ++i) {
      BarrierInit(&c.item_full[i], 1);
      BarrierInit(&c.item_empty[i], 4 * kGroups);
    }
    FenceBarrierInit();
    PrefetchTensorMap(&args.k_map);
    PrefetchTensorMap(&args.q_map);
    if (args.grid.shape.direct_q) PrefetchTensorMap(&args.q_direct_map);
    if (args.grid.shape.direct_k) PrefetchTensorMap(&args.k_direct_map);
  }
  __syncthreads();
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize(); // rows and cells are there, and the last chunk's sums have been read
  if (warp >= 4 * kGroups) {
    ShrinkRegisters<40>();
    if (warp == 4 * kGroups) Produce(args, plan, shared, c);
  } else {
    GrowRegisters<232>();
    Scorer<T> scorer{args,
                     plan,
                     shared,
                     c,
                     staging + warp * kWarpRows * plan.staging_row,
                     warp / 4,
                     warp % 4,
                     static_cast<int>(threadIdx.x % 32),
                     {}};
    scorer.Run();
  }
}

} // namespace

cudaError_t LaunchGridScore(const GridScoreArgs& args, cudaStream_t stream) {
  const GridArgs& a = args.grid;
  const GridShape& g = a.shape;
  const Problem& p = a.d.p;
  ScorePlan plan{};
  plan.steps = DivUp(g.columns, kPanel);
  plan.whole_groups = g.cells_a_block % 8 == 0;
  plan.stages = plan.whole_groups ? 4 : 3;
  // 16 bytes more than the row: then eight rows begin on different banks.
  plan.staging_row = (plan.whole_groups ? g.block_pitch : kKeyTileCells) * 2 + 16;
  plan.slots = static_cast<int>((int64_t{a.tiles} * a.rules.units_a_kv) / g.stride + p.batch);
  plan.by_groups = Divider::Of(DivUp(plan.slots, kGroupStrips));
  plan.by_columns = Divider::Of(p.head_dim);
  int device = 0, processors = 0;
  if (cudaError_t e = cudaGetDevice(&device)) return e;
  if (cudaError_t e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return e;
  const auto kernel = p.q.dtype == FP_BF16 ? ScoreKernel<__nv_bfloat16> : ScoreKernel<__half>;
  const int bytes = plan.stages * kStage + StagingBytes(plan) + static_cast<int>(sizeof(Control)) + 1024;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return e;
  const int64_t most = int64_t{plan.slots} * g.key_tiles * p.kv_heads;
  return LaunchOverlapped(kernel, true, std::min<int64_t>(processors, most), kThreads, bytes, stream, args, plan);
}

} // namespace flashprefill::cuda
