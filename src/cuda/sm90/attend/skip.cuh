// Attention that skips what weighs next to nothing (fp_block_mask::skip): the kernel of attend.cuh with another order
// of keys (ascending_iterator.cuh) and another math side.
//
// A step is a chunk. Its largest score per row is compared with the largest of the chunks that the row counted before:
// that is the one thing more in a step, 64 comparisons per lane, in the shadow of P V. Each row decides for itself. A
// warp whose rows all skip takes no exponentials; where all four warps of a warpgroup skip, it has no P V; and V is
// only copied once a warp of the CTA counts the step, which is some 1,800 cycles before its P V (IsWanted).
//
// A warpgroup's vote is an mbarrier: its warps arrive when they have decided, and wait at the step's end, when the
// exponentials are done, so that nobody waits for the others in between. The loading side waits on it too.
//
// Whether there is a P V of the step before decides between two ways through a step, each straight, so that no branch
// lies between the issue of a product and its end.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_SKIP_CUH_
#define FLASHPREFILL_CUDA_SM90_ATTEND_SKIP_CUH_

#include "core/skip.h"
#include "cuda/sm90/attend/attend.cuh"

namespace flashprefill::cuda {

template <class T, class SHAPE>
class SkippingMath : public AttendMath<T, SHAPE, Loading::kAscending> {
  using Base = AttendMath<T, SHAPE, Loading::kAscending>;
  using Base::group_, Base::k_, Base::kHeadDim, Base::kKeys, Base::lane_, Base::last_key_, Base::max_, Base::o_,
      Base::out_, Base::p_, Base::q_, Base::row_, Base::s_, Base::sm_, Base::sum_, Base::v_, Base::weights_;
  static_assert(SHAPE::kQStages == 2 && kKeys == kSkipKeys, "a step is a chunk");

 public:
  __device__ __forceinline__ SkippingMath(const AttendParams& p, SkipMemory<SHAPE>& shared) : Base(p, shared) {}

  __device__ __forceinline__ void Run() {
    if (group_ == 1) NamedBarrierArrive(kTurnBarrier, kMathThreads); // the first turn is the first group's
    TileInfo tile = this->NextTile();
    if (tile.key_tiles == 0) return;
    this->IssueScores();
    this->PassTurn();
    WgmmaWait<0>();
    while (true) { // here the first scores of the tile are there, and no product is in flight
      Start(tile);
      bool has_weights = true, has_values = false; // of the step before; in o_
      for (int j = 1; j < tile.key_tiles; ++j) {
        if (has_weights) {
          this->IssueScores();
          this->template IssueValues<true>(has_values);
          has_values = true;
          const KeyTile& key_tile = this->KeyTileBefore(0);
          const KeyMode mode = key_tile.mode; // asked while the product runs
          WgmmaWait<1>();
          this->TakeScores(j + 1 == tile.key_tiles);
          has_weights = Step<true>(key_tile, mode, tile);
        } else {
          this->IssueScores();
          this->PassTurn();
          const KeyTile& key_tile = this->KeyTileBefore(0);
          const KeyMode mode = key_tile.mode;
          WgmmaWait<0>();
          this->TakeScores(j + 1 == tile.key_tiles);
          has_weights = Step<false>(key_tile, mode, tile);
        }
      }
      const TileInfo next = this->NextTile(); // asked before the products are issued, as in attend.cuh
      if (next.key_tiles == 0) {
        if (has_weights) {
          this->template IssueValues<false>(has_values);
          WgmmaWait<0>();
          this->TakeValues();
        }
        Finish();
        return;
      }
      if (has_weights) {
        this->template IssueValues<false>(has_values);
        this->IssueScores();
        this->PassTurn();
        WgmmaWait<1>();
        this->TakeValues();
        Finish();
      } else {
        this->IssueScores();
        this->PassTurn();
        Finish();
      }
      WgmmaWait<0>();
      tile = next;
    }
  }

 private:
  // A tile's first chunk, which counts for every row.
  __device__ __forceinline__ void Start(const TileInfo& tile) {
    this->StartRows(tile);
    skipped_ = 0;
    Decide(true, false);
    const KeyTile& key_tile = this->KeyTileBefore(0);
    this->TakeScores(tile.key_tiles == 1);
    this->FirstWeights(key_tile);
    top_[0] = max_[0];
    top_[1] = max_[1];
  }

  // A later step: whether some row of the warpgroup counts it, and then its weights. IN_FLIGHT: P V of the step before
  // is.
  template <bool IN_FLIGHT>
  __device__ __forceinline__ bool Step(const KeyTile& key_tile, KeyMode mode, const TileInfo& tile) {
    if (mode != KeyMode::kPlain) this->Mask(key_tile, mode);
    const bool means = mode == KeyMode::kMeans;
    float top[2] = {-INFINITY, -INFINITY};
    Largest(top);
    const float below = tile.skips ? p_.skip.below : -INFINITY;
    const bool skips[2] = {!means && top[0] < top_[0] + below, !means && top[1] < top_[1] + below};
    const int exist = RowsExist(tile.rows);
    const bool counts = __any_sync(~0u, (exist & 1 && !skips[0]) || (exist & 2 && !skips[1]));
    Decide(counts, IN_FLIGHT);
    CountSkipped(key_tile, mode, skips[0] && exist & 1, skips[1] && exist & 2);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!skips[r]) top_[r] = fmaxf(top_[r], top[r]);
    }
    NextWeights<IN_FLIGHT>(counts, means, skips, top, tile.rows);
    auto& sm = static_cast<SkipMemory<SHAPE>&>(sm_);
    BarrierWait(&sm.decided[group_][v_.stage], v_.parity);
    if (__any_sync(~0u, *reinterpret_cast<const volatile uint32_t*>(sm.counts[group_][v_.stage]) != 0)) return true;
    this->Release(&sm_.v_empty[v_.stage]);
    v_.Advance(SHAPE::kStages);
    return false;
  }

  // Tells the others whether this warp counts the step, whose V is the next one, or with P V in flight that after it.
  // The stage's last V has come, or was left out: so the loading side has read what was decided on it.
  __device__ __forceinline__ void Decide(bool counts, bool in_flight) {
    auto& sm = static_cast<SkipMemory<SHAPE>&>(sm_);
    RingPosition at = v_;
    if (in_flight) at.Advance(SHAPE::kStages);
    BarrierWait(&sm_.v_full[at.stage], at.parity ^ 1);
    if (lane_ == 0) {
      sm.counts[group_][at.stage][row_ / 16 % 4] = counts;
      BarrierArrive(&sm.decided[group_][at.stage]);
    }
  }

  __device__ __forceinline__ void Largest(float (&top)[2]) const {
    constexpr int kChains = 4; // not one: a step of a chain takes 4 cycles or more
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float t[kChains] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        t[i % kChains] = fmaxf(t[i % kChains], fmaxf(s_[4 * i + 2 * r], s_[4 * i + 2 * r + 1]));
      }
      top[r] = fmaxf(fmaxf(t[0], t[1]), fmaxf(t[2], t[3]));
      top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
    }
  }

  // As attend.cuh's: against references that lag behind, which a row that skips has at infinity. A warp that skips has
  // weights of zero; its neighbours may count the step.
  template <bool IN_FLIGHT>
  __device__ __forceinline__ void NextWeights(bool counts, bool means, const bool (&skips)[2], const float (&top)[2],
                                              int rows) {
    constexpr int kHalf = kKeys / 16; // of the step's groups of 8 columns
    const auto reference_of = [&](int r) {
      return skips[r] ? INFINITY : max_[r] * p_.exponent_scale - (means ? p_.mean_bias_log2 : 0);
    };
    float reference[2] = {reference_of(0), reference_of(1)};
    float part[2] = {0, 0};
    if constexpr (IN_FLIGHT) {
      uint32_t early[2 * kHalf] = {}; // P V still reads weights_
      if (counts) this->template Weights<0, kHalf>(early, reference, part);
      HoldBack(part[0], part[1], p_.minus_one, &sm_.never_written);
      WgmmaWait<0>();
      this->TakeValues();
#pragma unroll
      for (int i = 0; i < 2 * kHalf; ++i) weights_[i] = OpaqueCopy(early[i], p_.zero);
    } else if (counts) {
      this->template Weights<0, kHalf>(weights_, reference, part);
    }
    if (!counts) {
#pragma unroll
      for (int i = IN_FLIGHT ? 2 * kHalf : 0; i < 4 * kHalf; ++i) weights_[i] = OpaqueCopy(0, p_.zero);
      return;
    }
    this->template Weights<kHalf, 2 * kHalf>(weights_ + 2 * kHalf, reference, part);
    int large = (part[0] < kLargestSum<T> ? 0 : 1) | (part[1] < kLargestSum<T> ? 0 : 2);
    if (__any_sync(~0u, large) && __any_sync(~0u, large & RowsExist(rows))) {
      large |= __shfl_xor_sync(~0u, large, 1);
      large |= __shfl_xor_sync(~0u, large, 2);
      float grow[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) { // the largest scores are known: FollowMaxima would look for them again
        const float to = top[r] + (means ? p_.mean_bias : 0);
        const bool grows = large >> r & 1 && !skips[r] && to > max_[r];
        grow[r] = grows ? Exp2((max_[r] - to) * p_.exponent_scale) : 1.0f;
        max_[r] = grows ? to : max_[r];
      }
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o_[i] *= grow[i / 2 % 2];
      this->ReferencesOf(reference, means);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (skips[r]) reference[r] = INFINITY;
        part[r] = 0;
      }
      this->template Weights<0, 2 * kHalf>(weights_, reference, part);
      sum_[0] *= grow[0];
      sum_[1] *= grow[1];
    }
    sum_[0] += part[0];
    sum_[1] += part[1];
  }

  // Adds the keys of the step that the rows see which skip it.
  __device__ __forceinline__ void CountSkipped(const KeyTile& key_tile, KeyMode mode, bool first, bool second) {
    if (!first && !second) return;
    int seen[2] = {kKeys, kKeys};
    if (mode == KeyMode::kMasked) {
      seen[0] = seen[1] = 0;
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) seen[r] += min(max(last_key_[r] - key_tile.position[i] + 1, 0), 16);
      }
    }
    skipped_ += (first ? seen[0] : 0) + (second ? seen[1] : 0);
  }

  // O to memory, and what the tile skipped: the last of its warps writes it.
  __device__ __forceinline__ void Finish() {
    PackOutput<T, kHeadDim / 4>(o_, sum_, out_); // straight: nothing may branch while O is read
    TileSkipped& slot =
        static_cast<SkipMemory<SHAPE>&>(sm_).skipped[(q_.stage + 2 * q_.parity + 3) % 4]; // q_ is one further
    this->Store(slot.info);
    const uint32_t pairs = __reduce_add_sync(~0u, lane_ % 4 == 0 ? skipped_ : 0);
    if (lane_ != 0 || p_.skip.skipped == nullptr) return;
    constexpr int kCounter = 56; // the first bit of how many warps have come
    const auto before = atomicAdd(&slot.pairs, (1ull << kCounter) + pairs);
    if (before >> kCounter < kMathThreads / 32 - 1) return;
    const int64_t all = static_cast<int64_t>((before & ((1ull << kCounter) - 1)) + pairs);
    const int64_t rows = slot.info.rows;
    slot.pairs = 0;
    p_.skip.skipped[slot.mask_row] = static_cast<int32_t>((all + rows * p_.block_size / 2) / (rows * p_.block_size));
  }

  float top_[2]; // the largest score of the chunks that count
  int skipped_;  // pairs of this lane's rows and a key, where lane % 4 is 0
};

template <class T, class SHAPE>
struct Sides<T, SHAPE, Loading::kAscending> {
  using Math = SkippingMath<T, SHAPE>;
  using Producer = AttendProducer<SHAPE, Loading::kAscending>;
  using Memory = SkipMemory<SHAPE>;
};

template <class T, class SHAPE>
OneAttendKernel SkipKernelOf() {
  constexpr int kBytes = static_cast<int>(sizeof(SkipMemory<SHAPE>)) + kOperandAlign;
  static_assert(kBytes <= 227 * 1024, "the shared memory that a CTA may have");
  return {AttendSm90<T, SHAPE, Loading::kAscending>, kBytes};
}

// The content of an instantiation file: a dtype's kernel that skips, for a head dimension.
#define FLASHPREFILL_INSTANTIATE_SKIP(T, HEAD_DIM)   \
  template <>                                        \
  OneAttendKernel AttendSkipKernel<T, HEAD_DIM>() {  \
    return SkipKernelOf<T, AttendShape<HEAD_DIM>>(); \
  }

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_SKIP_CUH_
