// Scores, energies, threshold and bitmap of FlashPrefill and Sketch, in one kernel.
//
// The product is made transposed: 64 key blocks are the rows of a wgmma, query rows its columns. A block's energy is
// the sum over a row, so it is added up inside a thread and between the four lanes that share the row, every energy
// belongs to exactly one warp, and no barrier stands in the main loop. Columns are the 128 rows of one unit (query_pool
// 1) or eight units of eight pooled rows; a unit is one tile of one mask head (score.h).
//
// Exponentials need a common reference, and any will do: a warp keeps one for each of its units, the largest score of
// the first 16 blocks it sees. An energy is stored as its logarithm with the reference added back, so warps need not
// agree. Only where a sum gets too large, or is no number, the step is done again carefully: that sets a new reference
// and leaves out what is not finite. The first step of a unit goes that way too, because its reference is -inf then.
// So the loop has no maximum in it: a multiply-add, an exp2 and an add for each score.
//
// A CTA has two math warpgroups with units of their own and a producer warp, and is persistent; items come heaviest
// first (Place). Key data streams through a ring of 64-block stages that both warpgroups read; the next item's queries
// are loaded while this one is computed, if they fit. A warpgroup issues the product of step i+1 before the
// exponentials of step i, and the other one's run beside both. Energies of whole units stay in shared memory until
// keep.cuh turns them into bits, so nothing of size tiles x blocks x 4 bytes is ever in memory.
//
// A Sketch step is one plane of 64 blocks: mean with variance (the queries' squares against the variances, accumulated
// into the same product), then each outlier.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/attend.h"
#include "cuda/common/wgmma.cuh"
#include "cuda/sm90/keep.cuh"
#include "cuda/sm90/score.h"

namespace flashprefill::cuda {
namespace {

constexpr int kGroups = 2;                    // math warpgroups
constexpr int kThreads = 128 * kGroups + 128; // the producer is a warpgroup, so that registers can change hands
constexpr int kPanelColumns = 64;             // 128 bytes a row
constexpr int kPanelBytes = 128;              // of one row
constexpr int kMaxStages = 8;
constexpr int kMaxUnits = 8;         // of a warpgroup
constexpr float kLargeSum = 1.2e30f; // 2^100: 40 such sums still fit a float
constexpr int kSharedBytes = 227 * 1024;

// What the host has chosen beside the arguments.
struct Plan {
  int panels;   // of 64 columns a row of q or k
  int q_panels; // twice as many with squares
  int units;    // of a warpgroup in use, a power of two: fewer than fit where energies need the room
  int log2_units;
  int groups; // warpgroups in use
  int q_stages, k_stages;
  int energy_stride;                // floats a unit
  int slots;                        // items a KV head, at most
  Divider by_item, by_kv, by_heads; // units an item, kv_heads, heads_a_tile
};

// One piece of work: consecutive units of one KV head of one sequence.
struct Item {
  DeviceSequence sequence;
  int kv;
  int first; // unit
  int units; // of the sequence and KV head
  int steps; // times 64 blocks that some unit scores
  bool end;  // no more work
};

struct Unit {
  int scored; // blocks with an energy; 0 if nothing is chosen by score
  int full;   // blocks [0, full) are seen by each of the unit's columns
  int tile;
  bool dense;
};

struct Control {
  uint64_t q_full[2], q_empty[2], k_full[kMaxStages], k_empty[kMaxStages];
  Item item[2];
  Unit unit[kGroups][kMaxUnits];
  int kept[kGroups][4];                // bits that each warp has set, where several share a unit
  alignas(16) int limit[kGroups][128]; // of each column: it sees blocks [0, limit)
};

struct Layout { // of dynamic shared memory, after the alignment to 1024
  int q_group, q_stage, k_stage, k, energies, energies_group, control, total;
};

__host__ __device__ inline Layout LayoutOf(const Plan& plan, int columns) {
  Layout l;
  l.q_group = plan.q_panels * columns * kPanelBytes;
  l.q_stage = l.q_group * plan.groups;
  l.k_stage = plan.panels * kStepBlocks * kPanelBytes;
  l.k = l.q_stage * plan.q_stages;
  l.energies = l.k + l.k_stage * plan.k_stages;
  l.energies_group = plan.units * plan.energy_stride * 4;
  l.control = (l.energies + l.energies_group * plan.groups + 15) / 16 * 16;
  l.total = l.control + static_cast<int>(sizeof(Control));
  return l;
}

// Where a side of a ring of stages stands: the next stage, and how often (mod 2) it has been round.
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

__device__ inline bool IsFinite(float x) { return fabsf(x) < INFINITY; }

// Where an item's number leads. Items of a sequence begin at (its first mask row * mask heads a KV head) / units an
// item
// + b, which leaves room for all of them without prefix sums, as fp_tile_base does for tiles. Higher numbers are
// earlier tiles, because the last tiles have the most blocks to score.
__device__ inline bool Place(const ScoreArgs& a, const Plan& plan, int id, Item& item) {
  const TileRules& r = a.rules;
  const int units_an_item = plan.units * plan.groups;
  const int round = plan.by_kv(id);
  item.kv = id - round * a.d.p.kv_heads;
  const int slot = plan.slots - 1 - round;
  auto base = [&](int b) { return plan.by_item(TileBaseOf(a.d, r, b) * r.units_a_kv) + b; };
  const int b = SequenceOfSlot(a.d.p.batch, slot, base);
  item.sequence = SequenceAt(a.d, b);
  item.units = item.sequence.Tiles(r) * r.units_a_kv;
  item.first = (slot - base(b)) * units_an_item;
  item.end = false;
  if (item.first < 0 || item.first >= item.units) return false;
  const int last_tile =
      min((min(item.first + units_an_item, item.units) - 1) / r.units_a_kv, FirstDenseTile(r, item.sequence) - 1);
  const bool scored = last_tile >= item.first / r.units_a_kv && !AllForcedAt(a.d.p, r, item.sequence);
  item.steps = scored ? (TileAt(a.d.p, r, item.sequence, last_tile).scored + kStepBlocks - 1) / kStepBlocks : 0;
  return true;
}

// The one thread that starts copies.
__device__ inline void Produce(const ScoreArgs& a, const Plan& plan, const Layout& layout, char* shared, Control& c,
                               int columns) {
  const TileRules& r = a.rules;
  const int planes = a.sketch ? 2 + a.outliers : 1;
  Ring q_ring, k_ring;
  auto hand_over = [&](const Item& item) {
    const int stage = q_ring.stage;
    uint64_t* full = &c.q_full[stage];
    BarrierWait(&c.q_empty[stage], q_ring.round ^ 1);
    c.item[stage] = item;
    q_ring.Advance(plan.q_stages);
    if (item.end || item.steps == 0) {
      BarrierArrive(full);
      return;
    }
    const int tile_base = item.sequence.TileBase(r);
    char* const q = shared + stage * layout.q_stage;
    const int box_rows = a.rows_in_q ? r.tile_tokens * r.heads_a_tile : columns;
    int groups = 0;
    while (groups < plan.groups && item.first + groups * plan.units < item.units) ++groups;
    BarrierArriveExpect(full, groups * plan.q_panels * box_rows * kPanelBytes);
    for (int g = 0; g < groups; ++g) {
      const int unit = item.first + g * plan.units;
      const int64_t first_unit = (int64_t{item.kv} * r.tile_rows + tile_base) * r.units_a_kv + unit;
      for (int panel = 0; panel < plan.q_panels; ++panel) {
        char* const to = q + g * layout.q_group + panel * columns * kPanelBytes;
        if (a.rows_in_q) {
          const int tile = r.by_units(unit), token = tile * r.tile_tokens;
          const int head = (item.kv * r.units_a_kv + unit - tile * r.units_a_kv) * r.heads_a_tile;
          BulkLoad(to, &a.q_map, full, panel * kPanelColumns, head,
                   a.d.p.cu_seqlens_q ? item.sequence.q_begin + token : token,
                   a.d.p.cu_seqlens_q ? 0 : item.sequence.index);
        } else {
          const bool squares = panel >= plan.panels;
          BulkLoad(to, &a.q_map, full, (squares ? panel - plan.panels : panel) * kPanelColumns,
                   static_cast<int>((first_unit + (squares ? a.unit_count : 0)) * a.unit_rows), 0, 0);
        }
      }
    }
    const bool packed = a.d.p.cu_seqlens_k && !a.d.p.block_table;
    const int64_t base = item.kv * a.mean_rows +
                         MeanBase(packed, item.sequence.index, item.sequence.k_begin, a.d.p.max_seqlen_k, r.block_size);
    for (int step = 0; step < item.steps; ++step) {
      for (int plane = 0; plane < planes; ++plane) {
        uint64_t* const full_k = &c.k_full[k_ring.stage];
        BarrierWait(&c.k_empty[k_ring.stage], k_ring.round ^ 1);
        BarrierArriveExpect(full_k, layout.k_stage);
        const int64_t row = base + plane * (a.mean_rows * a.d.p.kv_heads) + step * kStepBlocks;
        for (int panel = 0; panel < plan.panels; ++panel) {
          BulkLoad(shared + layout.k + k_ring.stage * layout.k_stage + panel * kStepBlocks * kPanelBytes, &a.k_map,
                   full_k, panel * kPanelColumns, static_cast<int>(row), 0, 0);
        }
        k_ring.Advance(plan.k_stages);
      }
    }
  };
  for (int id = blockIdx.x; id < plan.slots * a.d.p.kv_heads; id += gridDim.x) {
    Item item;
    if (Place(a, plan, id, item)) hand_over(item);
  }
  Item end{};
  end.end = true;
  hand_over(end);
}

// A math warpgroup. COLUMNS query rows, ROWS of them a unit.
template <typename T, int PANELS, int COLUMNS, int ROWS, bool SKETCH>
struct Scorer {
  static constexpr int kUnits = COLUMNS / ROWS;
  static constexpr int kSlices = ROWS / 8; // of 8 columns a unit: 2 scores of each of two rows a thread
  using Scores = float[COLUMNS / 2];

  const ScoreArgs& a;
  const Plan& plan;
  const Layout& layout;
  char* shared;
  Control& c;
  int group, warp, lane;   // warpgroup, warp in it, lane
  Ring k_next, k_released; // stages: to be multiplied, to be given back
  float* energies;

  Item item;
  uint32_t q_address;
  unsigned live; // bit u: unit u is scored
  int all_full;  // blocks that every column of every live unit sees
  float reference[kUnits];
  float sum[2][kUnits]; // of the block in row lane / 4, and of the one 8 rows on

  __device__ void Sync() const { NamedBarrierSync(1 + group, 128); }

  // Units and column limits of the item, into shared memory; a barrier on both sides keeps them from their readers.
  __device__ void SetUp() {
    const TileRules& r = a.rules;
    const int thread = 32 * warp + lane;
    const int first = item.first + group * plan.units;
    const int first_dense = item.steps > 0 ? FirstDenseTile(r, item.sequence) : 0;
    auto limit_of = [&](const DeviceTile& tile, int j) {
      const int begin = tile.begin + j * a.query_pool;
      if (begin >= tile.end) return 0;
      const int position = item.sequence.prefix + min(begin + a.query_pool, tile.end) - 1;
      return r.shared ? min(r.by_block(position) + 1, tile.scored) : r.by_block(position + 1);
    };
    if (thread < COLUMNS) {
      const int u = thread / ROWS, row = thread % ROWS;
      const int tile_index = r.by_units(first + u);
      int limit = 0;
      if (group < plan.groups && u < plan.units && first + u < item.units && tile_index < first_dense &&
          row < a.rows_a_head * r.heads_a_tile) {
        limit = limit_of(TileAt(a.d.p, r, item.sequence, tile_index), plan.by_heads(row));
      }
      c.limit[group][thread] = limit;
    }
    if (thread < kUnits) {
      Unit unit{0, 0, r.by_units(first + thread), false};
      if (group < plan.groups && thread < plan.units && first + thread < item.units) {
        unit.dense = unit.tile >= first_dense;
        if (item.steps == 0) unit.dense = true; // all forced, or all in the dense tail
        if (!unit.dense) {
          const DeviceTile tile = TileAt(a.d.p, r, item.sequence, unit.tile);
          unit.scored = tile.scored;
          const bool whole = tile.end - tile.begin == r.tile_tokens && a.rows_a_head * r.heads_a_tile == ROWS;
          unit.full = whole ? limit_of(tile, 0) : 0;
        }
      }
      c.unit[group][thread] = unit;
    }
    Sync();
    live = 0;
    all_full = 1 << 30;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const Unit unit = c.unit[group][u];
      if (unit.scored > 0) {
        live |= 1u << u;
        all_full = min(all_full, unit.full);
      }
      reference[u] = -INFINITY;
      sum[0][u] = sum[1][u] = 0;
    }
  }

  // Starts the product of the next PLANES planes (two: queries with means plus squares with variances) into scores.
  template <int PLANES>
  __device__ __forceinline__ void Issue(Scores& scores) {
    uint64_t k[PLANES];
#pragma unroll
    for (int s = 0; s < PLANES; ++s) {
      BarrierWait(&c.k_full[k_next.stage], k_next.round);
      k[s] = DescribeKMajor(SharedAddress(shared + layout.k + k_next.stage * layout.k_stage));
      k_next.Advance(plan.k_stages);
    }
    WgmmaFence();
#pragma unroll
    for (int s = 0; s < PLANES; ++s) {
      const uint64_t q = DescribeKMajor(q_address + s * PANELS * COLUMNS * kPanelBytes);
#pragma unroll
      for (int slice = 0; slice < 4 * PANELS; ++slice) { // 16 columns: 32 bytes; addresses count in units of 16
        Wgmma<T>::SS(scores, k[s] + slice / 4 * (kStepBlocks * kPanelBytes / 16) + slice % 4 * 2,
                     q + slice / 4 * (COLUMNS * kPanelBytes / 16) + slice % 4 * 2, s + slice > 0);
      }
    }
    WgmmaCommit();
  }

  __device__ __forceinline__ void Release(int stages) {
    for (int i = 0; i < stages; ++i) {
      if (lane == 0) BarrierArrive(&c.k_empty[k_released.stage]);
      k_released.Advance(plan.k_stages);
    }
  }

  // A score of unit u in base 2, of its slice of 8 columns, the two rows and the two columns in it that a thread has;
  // -inf if the column does not see the block.
  __device__ __forceinline__ float MaskedScore(const Scores& scores, int u, int slice, int half, int column,
                                               int block) {
    const int index = u * kSlices + slice;
    return block + 8 * half < c.limit[group][8 * index + 2 * (lane % 4) + column]
               ? scores[4 * index + 2 * half + column] * a.scale_log2
               : -INFINITY;
  }

  // Adds the step's exponentials to the sums, `weight` times, where every column sees every block of the warp. False,
  // and nothing done, if that needs care.
  __device__ __forceinline__ bool AddUp(const Scores& scores, float weight) {
    float x[2][kUnits];
    bool careful = false;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const float offset = -reference[u];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        x[half][u] = 0;
#pragma unroll
        for (int i = 0; i < 2 * kSlices; ++i) {
          x[half][u] += Exp2(fmaf(scores[4 * (u * kSlices + i / 2) + 2 * half + i % 2], a.scale_log2, offset));
        }
        careful |= (live >> u & 1) && !(x[half][u] < kLargeSum);
      }
    }
    if (__any_sync(~0u, careful)) return false;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      sum[0][u] = SKETCH ? fmaf(weight, x[0][u], sum[0][u]) : x[0][u];
      sum[1][u] = SKETCH ? fmaf(weight, x[1][u], sum[1][u]) : x[1][u];
    }
    return true;
  }

  // A first reference for each unit: the largest score that counts of its first eight columns. Where there is none it
  // is -inf, and AddUp asks for care.
  __device__ __forceinline__ void StartReferences(const Scores& scores, int block) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float largest = -INFINITY;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float z = MaskedScore(scores, u, 0, i / 2, i % 2, block);
        if (IsFinite(z)) largest = fmaxf(largest, z);
      }
      reference[u] = WarpMax(largest);
    }
  }

  // The same with a mask, a new reference, the largest score so far, and without scores that are not finite.
  __device__ __forceinline__ void AddUpCarefully(const Scores& scores, int block, float weight) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float largest = -INFINITY;
#pragma unroll
      for (int i = 0; i < 4 * kSlices; ++i) {
        const float z = MaskedScore(scores, u, i / 4, i / 2 % 2, i % 2, block);
        if (IsFinite(z)) largest = fmaxf(largest, z);
      }
      largest = fmaxf(WarpMax(largest), reference[u]);
      // Nothing finite yet: nothing is added, and the reference stays -inf, which leads here again.
      const float base = largest == -INFINITY ? 0.f : largest;
      const float rescale = Exp2(reference[u] - base);
      reference[u] = largest;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = 0;
#pragma unroll
        for (int i = 0; i < 2 * kSlices; ++i) {
          const float z = MaskedScore(scores, u, i / 2, half, i % 2, block);
          if (IsFinite(z)) x += Exp2(z - base);
        }
        sum[half][u] = sum[half][u] * rescale + weight * x;
      }
    }
  }

  // The sums are complete but for the four lanes of a row: these exchange halves, so that each ends with a quarter of
  // the (row, unit) pairs, and stores those. Three shuffles for four pairs instead of eight.
  __device__ void Store(int step) {
    const bool second_row = lane & 1, second_half = lane & 2;
    float row[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const float other = __shfl_xor_sync(~0u, second_row ? sum[0][u] : sum[1][u], 1);
      row[u] = (second_row ? sum[1][u] : sum[0][u]) + other;
      sum[0][u] = sum[1][u] = 0;
    }
    const int block = step * kStepBlocks + 16 * warp + lane / 4 + (second_row ? 8 : 0);
    if constexpr (kUnits == 1) {
      const float total = row[0] + __shfl_xor_sync(~0u, row[0], 2);
      if (!second_half && (live & 1)) energies[block] = __log2f(total) + reference[0];
    } else {
      constexpr int kHalf = kUnits / 2;
#pragma unroll
      for (int u = 0; u < kHalf; ++u) {
        const float other = __shfl_xor_sync(~0u, second_half ? row[u] : row[u + kHalf], 2);
        const float total = (second_half ? row[u + kHalf] : row[u]) + other;
        const int unit = second_half ? u + kHalf : u;
        const float base = second_half ? reference[u + kHalf] : reference[u];
        if (live >> unit & 1) energies[unit * plan.energy_stride + block] = __log2f(total) + base;
      }
    }
  }

  // Product i of Products is done: its stages go back, and its exponentials are added up.
  __device__ __forceinline__ void Finish(const Scores& scores, int i, int sketch_step) {
    const bool spread = SKETCH && i == 0; // means and variances, in the name of all keys but the outliers
    const int step = SKETCH ? sketch_step : i;
    Release(spread ? 2 : 1);
    const float weight = spread ? static_cast<float>(a.rules.block_size - a.outliers) : 1.f; // scored blocks are whole
    const int warp_block = step * kStepBlocks + 16 * warp, block = warp_block + lane / 4;
    bool done = false;
    if (warp_block + 16 <= all_full) {
      if (i == 0 && step == 0) StartReferences(scores, block);
      done = AddUp(scores, weight);
    }
    if (!done) AddUpCarefully(scores, block, weight);
    if (!SKETCH) Store(step);
  }

  // FlashPrefill: a product for each step of the item. Sketch: those of one step, the first of two planes. One product
  // is in flight while the one before it is added up. The end stands apart, because the compiler overlaps products only
  // if it sees on every path which of them are done.
  __device__ __forceinline__ void Products(int count, int sketch_step) {
    Scores even, odd;
    int i = 0;
    Issue<SKETCH ? 2 : 1>(even);
    for (; i + 2 < count; i += 2) {
      Issue<1>(odd);
      WgmmaWait<1>();
      Finish(even, i, sketch_step);
      Issue<1>(even);
      WgmmaWait<1>();
      Finish(odd, i + 1, sketch_step);
    }
    const bool two = i + 2 == count;
    if (two) {
      Issue<1>(odd);
      WgmmaWait<1>();
    } else {
      WgmmaWait<0>();
    }
    Finish(even, i, sketch_step);
    if (two) {
      WgmmaWait<0>();
      Finish(odd, i + 1, sketch_step);
    }
  }

  __device__ __forceinline__ void Steps(int steps) {
    if constexpr (SKETCH) {
      for (int step = 0; step < steps; ++step) {
        Products(1 + a.outliers, step);
        Store(step);
      }
    } else {
      if (steps > 0) Products(steps, 0);
    }
  }

  // Bits from complete energies: a warp takes every fourth unit; one or two units are shared by the four warps.
  __device__ void WriteUnits() {
    const TileRules& r = a.rules;
    const bool share = plan.log2_units < 2;
    const int log2_parts = share ? 2 - plan.log2_units : 0;
    const int first = warp & (plan.units - 1), part = share ? warp >> plan.log2_units : 0;
    int kept = 0;
    int64_t row = -1;
    for (int u = share ? first : warp; u < plan.units && group < plan.groups; u += 4) {
      const int index = item.first + group * plan.units + u;
      if (index >= item.units) break;
      const Unit unit = c.unit[group][u];
      const DeviceTile tile = TileAt(a.d.p, r, item.sequence, unit.tile);
      const int mask_row = item.sequence.TileBase(r) + unit.tile;
      if (mask_row >= r.tile_rows) break;
      row = (int64_t{item.kv} * r.units_a_kv + index - unit.tile * r.units_a_kv) * r.tile_rows + mask_row;
      MaskRow what{unit.scored, tile.visible, r.sink_blocks, WindowBegin(r, tile)};
      if (unit.dense) what.sink = tile.visible;
      kept = WriteMaskRow(a.keep, what, energies + u * plan.energy_stride,
                          reinterpret_cast<uint32_t*>(a.bits + row * a.words), static_cast<int>(2 * a.words), part,
                          log2_parts);
      if (!share && a.counts && lane == 0) a.counts[row] = kept;
    }
    if (share && lane == 0) c.kept[group][warp] = kept;
    Sync(); // energies and units are free for the next item
    if (share && part == 0 && row >= 0 && a.counts && lane == 0) {
      for (int w = first + plan.units; w < 4; w += plan.units) kept += c.kept[group][w];
      a.counts[row] = kept;
    }
  }

  __device__ void Run() {
    Ring q_ring;
    for (;;) {
      const int stage = q_ring.stage;
      BarrierWait(&c.q_full[stage], q_ring.round);
      q_ring.Advance(plan.q_stages);
      item = c.item[stage];
      if (item.end) return;
      q_address = SharedAddress(shared + stage * layout.q_stage + (group < plan.groups ? group : 0) * layout.q_group);
      SetUp();
      Steps(__shfl_sync(~0u, item.steps, 0)); // the compiler sees that the warp agrees
      __syncwarp();
      if (lane == 0) BarrierArrive(&c.q_empty[stage]); // the queries are no longer needed
      Sync();
      WriteUnits();
    }
  }
};

template <typename T, int PANELS, int COLUMNS, int ROWS, bool SKETCH>
__global__ void __launch_bounds__(kThreads, 1)
    ScoreKernel(const __grid_constant__ ScoreArgs a, const __grid_constant__ Plan plan) {
  extern __shared__ char raw[];
  char* const shared = raw + (1024 - SharedAddress(raw) % 1024) % 1024;
  const Layout layout = LayoutOf(plan, COLUMNS);
  Control& c = *reinterpret_cast<Control*>(shared + layout.control);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0); // the compiler sees that a warp agrees

  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.q_stages; ++i) {
      BarrierInit(&c.q_full[i], 1);
      BarrierInit(&c.q_empty[i], 4 * kGroups); // an arrival a warp
    }
    for (int i = 0; i < plan.k_stages; ++i) {
      BarrierInit(&c.k_full[i], 1);
      BarrierInit(&c.k_empty[i], 4 * kGroups);
    }
    FenceBarrierInit();
    PrefetchTensorMap(&a.q_map);
    PrefetchTensorMap(&a.k_map);
  }
  __syncthreads();
  cudaGridDependencySynchronize(); // what the pooling pass wrote

  if (warp >= 4 * kGroups) {
    ShrinkRegisters<24>();
    if (threadIdx.x == 128 * kGroups) Produce(a, plan, layout, shared, c, COLUMNS);
  } else {
    GrowRegisters<240>();
    const int group = warp / 4;
    Scorer<T, PANELS, COLUMNS, ROWS, SKETCH> scorer{a, plan,  layout,   shared,
                                                    c, group, warp % 4, static_cast<int>(threadIdx.x % 32)};
    scorer.energies =
        reinterpret_cast<float*>(shared + layout.energies + (group < plan.groups ? group : 0) * layout.energies_group);
    scorer.Run();
  }
}

// The largest plan that fits in shared memory. What does not fit goes in this order: the fourth stage of keys (a step
// of Sketch needs three), the second stage of queries, units, the second warpgroup.
bool PlanFor(int head_dim, int64_t max_blocks, int unit_rows, bool sketch, Plan& plan) {
  const int columns = ScoreColumns(unit_rows);
  plan.panels = static_cast<int>(std::bit_ceil(static_cast<unsigned>(DivUp(head_dim, kPanelColumns))));
  plan.q_panels = plan.panels * (sketch ? 2 : 1);
  // 4 more than a multiple of 8: the two halves of Store's units then fall on different banks.
  const int64_t stride = DivUp<int64_t>(std::max<int64_t>(max_blocks, 1), kStepBlocks) * kStepBlocks + 4;
  if (stride > (1 << 20)) return false;
  plan.energy_stride = static_cast<int>(stride);
  for (plan.groups = kGroups; plan.groups >= 1; --plan.groups) {
    for (plan.units = columns / unit_rows; plan.units >= 1; plan.units /= 2) {
      for (plan.q_stages = 2; plan.q_stages >= 1; --plan.q_stages) {
        for (plan.k_stages = 4; plan.k_stages >= 3; --plan.k_stages) {
          if (LayoutOf(plan, columns).total + 1024 <= kSharedBytes) return true;
        }
      }
    }
  }
  return false;
}

using Kernel = void (*)(ScoreArgs, Plan);

template <typename T, bool SKETCH, int PANELS>
Kernel KernelWithPanels(int unit_rows) {
  return unit_rows == 8    ? ScoreKernel<T, PANELS, 64, 8, SKETCH>
         : unit_rows == 32 ? ScoreKernel<T, PANELS, 64, 32, SKETCH>
                           : ScoreKernel<T, PANELS, 128, 128, SKETCH>;
}

template <typename T, bool SKETCH>
Kernel KernelOf(int panels, int unit_rows) {
  return panels == 1   ? KernelWithPanels<T, SKETCH, 1>(unit_rows)
         : panels == 2 ? KernelWithPanels<T, SKETCH, 2>(unit_rows)
                       : KernelWithPanels<T, SKETCH, 4>(unit_rows);
}

template <typename T>
Kernel KernelOf(const Plan& plan, int unit_rows, bool sketch) {
  return sketch ? KernelOf<T, true>(plan.panels, unit_rows) : KernelOf<T, false>(plan.panels, unit_rows);
}

} // namespace

int ScoreColumns(int unit_rows) { return unit_rows == 128 ? 128 : 64; }

const char* ScoreUnsupported(int head_dim, int64_t max_blocks, int unit_rows, bool sketch) {
  Plan plan;
  if (PlanFor(head_dim, max_blocks, unit_rows, sketch, plan)) return nullptr;
  return "max_seqlen_k / block_size is too large for the energies of a tile to stay in shared memory: it must be "
         "smaller "
         "(or block_size larger) with this head_dim and query_pool";
}

cudaError_t LaunchScore(const ScoreArgs& args, cudaStream_t stream) {
  const Problem& p = args.d.p;
  Plan plan;
  const int64_t max_blocks = DivUp<int64_t>(p.max_seqlen_k, args.rules.block_size);
  if (!PlanFor(p.head_dim, max_blocks, args.unit_rows, args.sketch, plan)) return cudaErrorInvalidValue;
  int device = 0, processors = 0;
  if (cudaError_t e = cudaGetDevice(&device)) return e;
  if (cudaError_t e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return e;
  // Smaller items where there would not be one for each processor.
  const int64_t units = int64_t{args.rules.tile_rows} * args.rules.units_a_kv;
  while (plan.units > 1 && units * p.kv_heads < int64_t{processors} * plan.units * plan.groups) plan.units /= 2;
  plan.slots = static_cast<int>(units / (plan.units * plan.groups) + p.batch);
  plan.log2_units = std::countr_zero(static_cast<unsigned>(plan.units));
  plan.by_item = Divider::Of(plan.units * plan.groups);
  plan.by_kv = Divider::Of(p.kv_heads);
  plan.by_heads = Divider::Of(args.rules.heads_a_tile);

  const Kernel kernel = p.q.dtype == FP_BF16 ? KernelOf<__nv_bfloat16>(plan, args.unit_rows, args.sketch)
                                             : KernelOf<__half>(plan, args.unit_rows, args.sketch);
  const int bytes = LayoutOf(plan, ScoreColumns(args.unit_rows)).total + 1024;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return e;

  cudaLaunchAttribute overlap{}; // this kernel may start while the pooling pass ends; it waits for it itself
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(processors, int64_t{plan.slots} * p.kv_heads)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args, plan);
}

} // namespace flashprefill::cuda
