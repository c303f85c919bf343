// Scores, energies, threshold and bitmap of FlashPrefill and Sketch for every GPU since Ampere. What the energies are
// and how bits come from them is common/energies/energy_math.cuh; this is how products come about.
//
// The product is made transposed, as on Hopper: 16 key blocks per warp are the rows of mma.sync, query rows its
// columns. All warps of a CTA make the pooled rows of an item, straight into shared memory; then key data streams
// through a ring of panels by asynchronous copies, all warps multiply and add up, and bits are written. A second CTA on
// the multiprocessor, where it fits, has its loads run beside this one's arithmetic. It is bound by shared memory (20
// KiB are read for a product of 16 x 64 x 128), and takes some 2 % of what the attention takes, so it is kept simple.
#ifndef FLASHPREFILL_CUDA_SM80_ENERGIES_SCORE_CUH_
#define FLASHPREFILL_CUDA_SM80_ENERGIES_SCORE_CUH_

#include "cuda/common/energies/energy_math.cuh"
#include "cuda/common/energies/unit_rows.cuh"
#include "cuda/common/grid_control.cuh"
#include "cuda/sm80/energies/score_plan.cuh"
#include "cuda/sm80/mma.cuh"

namespace flashprefill::cuda {

template <typename T, int PANELS, int COLUMNS, int ROWS, bool SKETCH>
struct PortableScorer : EnergyMath<COLUMNS, ROWS, SKETCH, COLUMNS == 64> {
  using Base = EnergyMath<COLUMNS, ROWS, SKETCH, COLUMNS == 64>;
  using Base::a, Base::set, Base::member, Base::warp;
  using typename Base::Scores;

  const PortableScorePlan& plan;
  const PortableScoreLayout& layout;
  char* shared;
  PortableScoreControl& control;
  uint32_t rows_address; // of this set's rows
  int item_steps;        // of 64 blocks

  __device__ __forceinline__ PortableScorer(const ScoreArgs& args, const PortableScorePlan& score_plan,
                                            const PortableScoreLayout& its_layout, char* memory,
                                            PortableScoreControl& c, int warp_of_cta)
      : Base{args, score_plan, c.units, warp_of_cta / 4, warp_of_cta % 4, static_cast<int>(threadIdx.x % 32)},
        plan(score_plan),
        layout(its_layout),
        shared(memory),
        control(c) {
    set = Base::group & (plan.sets - 1);
    member = Base::group / plan.sets;
    rows_address = SharedAddress(shared) + set * layout.rows_set;
    Base::energies = shared + layout.energies + set * layout.energies_set;
    Base::bins = SKETCH ? reinterpret_cast<uint32_t*>(shared + layout.bins) + warp_of_cta * kThresholdBins : nullptr;
  }

  // ---------------------------------------------------------------- query rows

  // Rows of all sets: means of rows of q, made here, or rows that lie in memory as they are multiplied.
  __device__ __forceinline__ void MakeRows(const ScoreItem& item) {
    if constexpr (COLUMNS == 64) {
      UnitRows<T, COLUMNS, ROWS, SKETCH, kPortableScoreThreads> unit_rows{a, plan, plan.panels};
      // With one group of warps the other half of the parts is done after the first.
      for (int half = 0; half < kPortableScoreGroups; half += plan.groups) {
        int i = static_cast<int>(threadIdx.x) + 128 * half;
        for (int s = 0; s < plan.sets; ++s) {
          char* const rows = shared + s * layout.rows_set;
          i = a.rows_aligned ? unit_rows.template Fill<true>(item, s, rows, i)
                             : unit_rows.template Fill<false>(item, s, rows, i);
        }
      }
    } else {
      for (int i = 0; i < (plan.streams ? 0 : plan.sets * plan.q_panels); ++i) {
        const int s = i / plan.q_panels, panel = i - s * plan.q_panels;
        CopyPanel(item, s, panel, SharedAddress(shared) + s * layout.rows_set + panel * COLUMNS * kRowBytes);
      }
      AsyncCopyCommit();
    }
  }

  // One panel of 64 columns of a set's rows, or of their squares.
  __device__ __forceinline__ void CopyPanel(const ScoreItem& item, int s, int q_panel, uint32_t to) const {
    const TileRules& r = a.rules;
    const Problem& p = a.d.p;
    const int unit = item.first + s * plan.units, tile_index = r.by_units(unit);
    const bool squares = q_panel >= PANELS;
    const int piece = threadIdx.x % 8,
              first_column = (squares ? q_panel - PANELS : q_panel) * kScorePanelColumns + piece * 8;
    const int tokens = min((tile_index + 1) * r.tile_tokens, item.sequence.q_len) - tile_index * r.tile_tokens;
    const int head = (item.kv * r.units_per_kv + unit - tile_index * r.units_per_kv) * r.heads_per_tile;
    const T* const q =
        static_cast<const T*>(p.q.data) + RowOffsetAt(p, p.q.stride, item.sequence, tile_index * r.tile_tokens, head);
    const int64_t in_scratch = (int64_t{item.kv} * r.tile_rows + item.sequence.TileBase(r)) * r.units_per_kv + unit;
#pragma unroll 2
    for (int row = threadIdx.x / 8; row < COLUMNS; row += blockDim.x / 8) {
      const int token = plan.by_heads(row);
      const T* from = nullptr;
      int columns = 0; // of the 8
      if (unit < item.units && !a.rows_in_q) {
        const int64_t scratch_row = (in_scratch + (squares ? a.unit_count : 0)) * a.unit_rows + row;
        from = static_cast<const T*>(a.rows) + scratch_row * a.pitch + first_column;
        columns = a.pitch - first_column;
      } else if (unit < item.units && token < tokens) {
        from = q + token * p.q.stride[1] + (row - token * r.heads_per_tile) * p.q.stride[2] + first_column;
        columns = p.head_dim - first_column;
      }
      columns = min(max(columns, 0), 8);
      AsyncCopyPart16(to + row * kRowBytes + ((piece ^ row % 8) << 4), columns > 0 ? from : p.q.data, 2 * columns);
    }
  }

  // ---------------------------------------------------------------- key data

  // A place in the stream of key data: one panel of one plane of an iteration, and the stage that it goes to.
  struct Place {
    int slot = 0, panel = 0, plane = 0, iteration = 0;

    __device__ __forceinline__ void Advance(int stages, int planes) {
      slot = slot + 1 == stages ? 0 : slot + 1;
      if (++panel < PANELS) return;
      panel = 0;
      if (++plane < planes) return;
      plane = 0;
      ++iteration;
    }
  };

  // The next stage; always a group of copies, also an empty one.
  __device__ __forceinline__ void LoadNext(const ScoreItem& item, int64_t first_row, int planes, int iterations,
                                           Place& next) const {
    if (next.iteration < iterations) {
      const int64_t plane_rows = a.mean_rows * a.d.p.kv_heads;
      const int64_t row0 = first_row + next.plane * plane_rows + int64_t{next.iteration} * plan.StageRows();
      const int rows = static_cast<int>(min(int64_t{plan.StageRows()}, plane_rows * planes - row0));
      const int piece = threadIdx.x % 8, column = next.panel * kScorePanelColumns + piece * 8;
      const T* const from = static_cast<const T*>(a.keys) + row0 * a.pitch + (column < a.pitch ? column : 0);
      const uint32_t to = SharedAddress(shared) + layout.stages + next.slot * layout.stage;
#pragma unroll 4
      for (int row = threadIdx.x / 8; row < plan.StageRows(); row += blockDim.x / 8) {
        const bool there = row < rows && column < a.pitch;
        AsyncCopy16(to + row * kRowBytes + ((piece ^ row % 8) << 4), from + (there ? row * a.pitch : 0), there);
      }
    }
    if (COLUMNS == 128 && plan.streams && next.iteration < iterations) {
      CopyPanel(item, 0, next.panel + (SKETCH && next.plane == 1 ? PANELS : 0),
                SharedAddress(shared) + layout.stages + next.slot * layout.stage + plan.StageRows() * kRowBytes);
    }
    next.Advance(plan.stages, planes);
    AsyncCopyCommit();
  }

  __device__ __forceinline__ void WaitForStage() const {
    if (plan.stages == 3) {
      AsyncCopyWait<1>();
    } else {
      AsyncCopyWait<0>();
    }
    __syncthreads();
  }

  // ---------------------------------------------------------------- products

  // scores += 16 blocks of a stage times the rows' panel.
  __device__ __forceinline__ void Multiply(Scores& scores, int slot, int q_panel) const {
    const uint32_t keys = SharedAddress(shared) + layout.stages + slot * layout.stage;
    const uint32_t a_at = RowsOfA(keys, member * kStepBlocks + 16 * warp);
    const uint32_t b_at =
        RowsOfB(plan.streams ? keys + plan.StageRows() * kRowBytes : rows_address + q_panel * COLUMNS * kRowBytes, 0);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t blocks[4];
      LoadMatrix4(blocks, Piece(a_at, k));
#pragma unroll
      for (int n = 0; n < COLUMNS / 16; ++n) {
        uint32_t b[4];
        LoadMatrix4(b, Piece(b_at, k) + n * 16 * kRowBytes);
        Mma<T>(scores + 8 * n, blocks, b[0], b[1]);
        Mma<T>(scores + 8 * n + 4, blocks, b[2], b[3]);
      }
    }
  }

  __device__ __forceinline__ void Steps(const ScoreItem& item) {
    const int planes = SKETCH ? 2 + a.outliers : 1, team = plan.Team();
    const int steps = item.steps, iterations = (steps + team - 1) >> plan.log2_team;
    const int64_t first_row = item.kv * a.mean_rows + MeanBase(a.d.p, item.sequence, a.rules.block_size);
    Place next;
    for (int i = 0; i < plan.stages - 1; ++i) LoadNext(item, first_row, planes, iterations, next);
    int slot = 0;
#pragma unroll 1
    for (int iteration = 0; iteration < iterations; ++iteration) {
      const int step = iteration * team + member;
      Scores scores;
#pragma unroll 1
      for (int plane = 0; plane < planes; ++plane) {
        const bool spread = SKETCH && plane == 1; // variances, with the squares of rows: added to the means' scores
        if (!spread) {
#pragma unroll
          for (float& s : scores) s = 0;
        }
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel) {
          WaitForStage();
          LoadNext(item, first_row, planes, iterations, next);
          Multiply(scores, slot, (spread ? PANELS : 0) + panel);
          slot = slot + 1 == plan.stages ? 0 : slot + 1;
        }
        if (SKETCH && plane == 0) continue;
        if (step < steps) Base::Finish(scores, step, iteration == 0 && plane < 2, Base::Weight(spread));
      }
      if (COLUMNS == 64 && iteration == 0) Base::ShareBase();
      if (step < steps) Base::Store(step);
    }
  }

  // ---------------------------------------------------------------- items

  __device__ __forceinline__ void Run() {
    // Columns beyond head_dim stay zero.
    for (int i = threadIdx.x; i < layout.stages / 16; i += blockDim.x) {
      reinterpret_cast<uint4*>(shared)[i] = uint4{0, 0, 0, 0};
    }
    int id = blockIdx.x;
#pragma unroll 1
    while (true) {
      __syncthreads(); // all have done with the item before
      if (threadIdx.x == 0) {
        ScoreItem item;
        NextScoreItem(a, plan, id, item);
        control.item = item;
      }
      __syncthreads();
      const ScoreItem& item = control.item;
      if (item.end) return;
      if (item.steps > 0) MakeRows(item);
      Base::SetUp(item);
      if (item.steps > 0) Steps(item); // its first barrier makes the rows visible
      AsyncCopyWait<0>();
      Base::SyncTeam();
      Base::WriteUnits();
    }
  }
};

template <typename T, int PANELS, int COLUMNS, int ROWS, bool SKETCH>
__global__ void __launch_bounds__(kPortableScoreThreads, 2)
    PortableScoreKernel(const __grid_constant__ ScoreArgs a, const __grid_constant__ PortableScorePlan plan) {
  extern __shared__ __align__(128) char shared[];
  const PortableScoreLayout layout = PortableScoreLayoutOf(plan, COLUMNS, SKETCH);
  auto& control = *reinterpret_cast<PortableScoreControl*>(shared + layout.control);
  GridRelease(); // attend may take its place as soon as there is room
  GridWait();    // the pooling pass has written its results
  PortableScorer<T, PANELS, COLUMNS, ROWS, SKETCH>(a, plan, layout, shared, control,
                                                   __shfl_sync(~0u, threadIdx.x / 32, 0))
      .Run();
}

using PortableScoreKernelPointer = void (*)(ScoreArgs, PortableScorePlan);

// The kernel of a dtype, defined in a file for each.
template <typename T, bool SKETCH>
PortableScoreKernelPointer PortableScoreKernelOf(int panels, int unit_rows);

#define FLASHPREFILL_INSTANTIATE_PORTABLE_SCORE(T, SKETCH)                                                             \
  namespace {                                                                                                          \
  template <int PANELS>                                                                                                \
  PortableScoreKernelPointer WithPanels(int unit_rows) {                                                               \
    return unit_rows == 8    ? PortableScoreKernel<T, PANELS, 64, 8, SKETCH>                                           \
           : unit_rows == 32 ? PortableScoreKernel<T, PANELS, 64, 32, SKETCH>                                          \
                             : PortableScoreKernel<T, PANELS, 128, 128, SKETCH>;                                       \
  }                                                                                                                    \
  }                                                                                                                    \
  template <>                                                                                                          \
  PortableScoreKernelPointer PortableScoreKernelOf<T, SKETCH>(int panels, int unit_rows) {                             \
    return panels == 1 ? WithPanels<1>(unit_rows) : panels == 2 ? WithPanels<2>(unit_rows) : WithPanels<4>(unit_rows); \
  }

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM80_ENERGIES_SCORE_CUH_
