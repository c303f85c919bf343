// A math warpgroup of the score kernel: products; energies and bits from them are common/energies/energy_math.cuh.
// score.cu says how and why.
#ifndef FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_MATH_CUH_
#define FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_MATH_CUH_

#include "cuda/common/energies/energy_math.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/sm90/energies/score_plan.cuh"

namespace flashprefill::cuda {

// A math warpgroup. COLUMNS query rows, ROWS of them per unit.
template <typename T, int PANELS, int COLUMNS, int ROWS, bool SKETCH>
struct Scorer : EnergyMath<COLUMNS, ROWS, SKETCH, ScoreShape<COLUMNS, SKETCH>::kHalfEnergies> {
  using Base = EnergyMath<COLUMNS, ROWS, SKETCH, ScoreShape<COLUMNS, SKETCH>::kHalfEnergies>;
  using Base::a, Base::lane, Base::set, Base::member, Base::Finish, Base::Store, Base::Weight;
  using typename Base::Scores;

  const ScorePlan& plan;
  const ScoreLayout& layout;
  char* shared;
  ScoreControl& control;
  RingPosition k_next, k_released; // stages: to be multiplied, to be given back
  uint32_t q_address, k_address;

  __device__ __forceinline__ Scorer(const ScoreArgs& args, const ScorePlan& score_plan, const ScoreLayout& its_layout,
                                    char* memory, ScoreControl& c, int warp)
      : Base{args, score_plan, c.units, warp / 4, warp % 4, static_cast<int>(threadIdx.x % 32)},
        plan(score_plan),
        layout(its_layout),
        shared(memory),
        control(c) {
    set = Base::group & (plan.sets - 1);
    member = Base::group / plan.sets;
    Base::energies = shared + layout.energies + set * layout.energies_set;
    Base::bins = SKETCH ? reinterpret_cast<uint32_t*>(shared + layout.bins) + warp * kThresholdBins : nullptr;
  }

  // Starts the product of the next plane of key data with plane `rows` of the queries, added to scores if that is not
  // the first (queries with means, then squares with variances).
  __device__ __forceinline__ void Multiply(Scores& scores, int rows) {
    BarrierWait(&control.k_full[k_next.stage], k_next.parity);
    constexpr int kStage = PANELS * kStepBlocks * kScorePanelBytes;
    const uint64_t k = DescribeKMajor(k_address + k_next.stage * kStage);
    // Made again for each product: eight slices' descriptors, kept, would push others out to local memory.
    uint32_t q_rows = q_address + rows * PANELS * COLUMNS * kScorePanelBytes;
    if constexpr (SKETCH) asm volatile("" : "+r"(q_rows));
    const uint64_t q = DescribeKMajor(q_rows);
    k_next.Advance(plan.k_stages);
    WgmmaFence();
#pragma unroll
    for (int slice = 0; slice < 4 * PANELS; ++slice) { // 16 columns: 32 bytes; addresses count in units of 16
      Wgmma<T>::SS(scores, k + slice / 4 * (kStepBlocks * kScorePanelBytes / 16) + slice % 4 * 2,
                   q + slice / 4 * (COLUMNS * kScorePanelBytes / 16) + slice % 4 * 2, rows + slice > 0);
    }
    WgmmaCommit();
  }

  // Gives stages back, the first that this warpgroup still holds. One lane does for its warp, so all lanes have to be
  // through their own wait for the stage: one that is not may find the barrier two phases on, and wait for ever.
  __device__ __forceinline__ void Release(int stages) {
    __syncwarp();
    for (int i = 0; i < stages; ++i) {
      if (lane == 0) BarrierArrive(&control.k_empty[k_released.stage]);
      k_released.Advance(plan.k_stages);
    }
  }

  // Product i of a step of Sketch is done: its stages go back, and its exponentials are added up.
  __device__ __forceinline__ void FinishProduct(const Scores& scores, int i, int step) {
    Release(i == 0 ? 2 : 1);
    Finish(scores, step, i == 0 && step == 0, Weight(i == 0));
  }

  // The products of one step, the first of two planes. One product is in flight while the one before it is added up.
  // The end stands apart, because the compiler overlaps products only if it sees on every path which of them are done.
  __device__ __forceinline__ void Products(int count, int step) {
    Scores even, odd;
    int i = 0;
    Multiply(even, 0);
    Multiply(even, 1);
    for (; i + 2 < count; i += 2) {
      Multiply(odd, 0);
      WgmmaWait<1>();
      FinishProduct(even, i, step);
      Multiply(even, 0);
      WgmmaWait<1>();
      FinishProduct(odd, i + 1, step);
    }
    const bool two = i + 2 == count;
    if (two) {
      Multiply(odd, 0);
      WgmmaWait<1>();
    } else {
      WgmmaWait<0>();
    }
    FinishProduct(even, i, step);
    if (two) {
      WgmmaWait<0>();
      FinishProduct(odd, i + 1, step);
    }
  }

  // One plane of a step after another, alone in the registers; the other warpgroups fill the matrix units while this
  // one adds up. Warpgroups of a team take turns at the steps and give the others' stages back unread.
  __device__ __forceinline__ void StepsInTurn(int steps) {
    const int planes = SKETCH ? 2 + a.outliers : 1, team = 1 << plan.log2_team;
    for (int step = 0; step < steps; ++step) {
      const bool mine = (step & (team - 1)) == member;
      Scores scores;
      for (int plane = 0; plane < planes; ++plane) {
        if (!mine) {
          BarrierWait(&control.k_full[k_next.stage], k_next.parity);
          k_next.Advance(plan.k_stages);
          Release(1);
          continue;
        }
        const bool spread = SKETCH && plane == 1;
        Multiply(scores, spread);
        WgmmaWait<0>();
        Release(1);
        if (SKETCH && plane == 0) continue;
        Finish(scores, step, step == member && plane < 2, Weight(spread));
      }
      if (mine) Store(step);
    }
  }

  __device__ __forceinline__ void Steps(int steps) {
    if constexpr (!ScoreShape<COLUMNS, SKETCH>::kTwoProducts) {
      StepsInTurn(steps);
    } else {
      for (int step = 0; step < steps; ++step) {
        Products(1 + a.outliers, step);
        if (step == 0) Base::ShareBase();
        Store(step);
      }
    }
  }

  __device__ void Run() {
    k_address = SharedAddress(shared + layout.k);
    RingPosition q_ring{set, 0};
    for (;;) {
      const int buffer = q_ring.stage;
      BarrierWait(&control.q_full[buffer], q_ring.parity);
      q_ring.AdvanceBy(plan.sets, plan.q_buffers);
      const ScoreItem& item = control.item[buffer];
      if (item.end) return;
      q_address = SharedAddress(shared + buffer * layout.q_buffer);
      Base::SetUp(item);
      Steps(__shfl_sync(~0u, item.steps, 0));  // the compiler sees that the warp agrees
      BarrierArrive(&control.q_empty[buffer]); // queries and item are no longer needed
      Base::SyncTeam();
      Base::WriteUnits();
    }
  }
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ENERGIES_SCORE_MATH_CUH_
