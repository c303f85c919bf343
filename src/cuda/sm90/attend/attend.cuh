// Exact softmax attention over the kept blocks of a mask, for Hopper. One persistent CTA an SM: a producer warpgroup
// (producer.cuh) and two math warpgroups of 64 query rows each.
//
// Why it is fast. The matrix units are kept busy from two sides. Inside a math warpgroup, the next Q K^T is issued
// before the P V of this step and both run while the softmax of the next scores is computed. Between the two, turns
// (two named barriers) make one warpgroup's softmax fall under the other one's products. Across tiles nothing drains:
// the first Q K^T of the next tile is issued before the last P V of this one is waited for, Q of the next tile is
// already there, and O leaves through shared memory while that product runs. P never leaves registers (wgmma.cuh says
// why it needn't).
//
// Weights are exponentials against a reference that a row keeps, the maximum of its first scores, for as long as its
// sums stay in range: there is no maximum in the common step (NextWeights).
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_ATTEND_CUH_
#define FLASHPREFILL_CUDA_SM90_ATTEND_ATTEND_CUH_

#include "cuda/common/grid_control.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/sm90/attend/gather_producer.cuh"
#include "cuda/sm90/attend/math_side.cuh"

namespace flashprefill::cuda {

// Whether each lane of the math side releases a stage, not one of each warp.
constexpr bool LanesRelease(Loading loading) { return LoadsRows(loading) || loading == Loading::kAscending; }

template <class T, class SHAPE, Loading LOADING>
class AttendMath {
 public:
  __device__ __forceinline__ AttendMath(const AttendParams& p, SharedMemory<SHAPE>& shared)
      : p_(p),
        sm_(shared),
        group_(__shfl_sync(~0u, threadIdx.x / 128, 0) - 1), // so the compiler knows that a warp agrees on it
        lane_(threadIdx.x % 32),
        row_(group_ * 64 + threadIdx.x % 128 / 32 * 16 + lane_ / 4) {}

  __device__ __forceinline__ void Run() {
    if (group_ == 1) NamedBarrierArrive(kTurnBarrier, kMathThreads); // the first turn is the first group's
    TileInfo tile = NextTile();
    if (tile.key_tiles == 0) return;
    IssueScores();
    PassTurn();
    WgmmaWait<0>();
    while (true) { // here the first scores of the tile are there, and no product is in flight
      StartRows(tile);
      const KeyTile& first_keys = KeyTileBefore(0);
      TakeScores(tile.key_tiles == 1);
      FirstWeights(first_keys);
      for (int j = 1; j < tile.key_tiles; ++j) {
        IssueScores();
        IssueValues<true>(j > 1);
        const KeyTile& key_tile = KeyTileBefore(0);
        const KeyMode mode = ModeOf(key_tile); // asked while the product runs
        WgmmaWait<1>();
        TakeScores(j + 1 == tile.key_tiles);
        NextWeights(key_tile, mode, tile.rows);
      }
      const bool several = tile.key_tiles > 1;
      TileInfo next;
      if constexpr (SHAPE::kQStages > 1) {
        next = NextTile(); // asked before the products are issued: ptxas serialises them if a branch lies in between
        if (next.key_tiles == 0) break;
        IssueValues<false>(several);
        IssueScores();
        PassTurn();
        WgmmaWait<1>();
        TakeValues();
        PackOutput<T, kHeadDim / 4>(o_, sum_, out_); // straight: nothing may branch while O is read
        Store(tile);
      } else { // the next Q can only come while O is written
        IssueValues<false>(several);
        WgmmaWait<0>();
        TakeValues();
        PackOutput<T, kHeadDim / 4>(o_, sum_, out_); // straight: nothing may branch while O is read
        Store(tile);
        next = NextTile();
        if (next.key_tiles == 0) return;
        IssueScores();
        PassTurn();
      }
      WgmmaWait<0>();
      tile = next;
    }
    IssueValues<false>(tile.key_tiles > 1);
    WgmmaWait<0>();
    TakeValues();
    PackOutput<T, kHeadDim / 4>(o_, sum_, out_); // straight: nothing may branch while O is read
    Store(tile);
  }

 protected: // of skip.cuh's math too
  static constexpr int kKeys = SHAPE::kKeys;
  static constexpr int kHeadDim = SHAPE::kHeadDim;
  static constexpr bool kGathers = LOADING == Loading::kGather;
  using Memory = SharedMemory<SHAPE>;

  // ---------------------------------------------------------------- tiles and turns

  __device__ __forceinline__ TileInfo NextTile() {
    BarrierWait(&sm_.q_full[q_.stage], q_.parity);
    return sm_.tiles[q_.stage];
  }

  // Row numbers become the last key position that each of this lane's two rows sees.
  __device__ __forceinline__ void StartRows(const TileInfo& tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = TokenOf(p_, row_ + 8 * r);
      last_key_[r] = min(tile.first_position + token, tile.last_key);
      max_[r] = -INFINITY;
    }
  }

  __device__ __forceinline__ void WaitTurn() { NamedBarrierSync(kTurnBarrier + group_, kMathThreads); }
  __device__ __forceinline__ void PassTurn() { NamedBarrierArrive(kTurnBarrier + 1 - group_, kMathThreads); }

  // One arrival per warp: a warp's part of a product may be done before its neighbours'. A lane's reads of a step's
  // description are in order before it: __syncwarp orders them before lane 0's arrival, and the loading warp that
  // writes over them four steps later has waited for the next stage's. racecheck does not follow that order from lane
  // to lane and reports it where a CTA has five steps or more; so by rows, where it costs nothing, every lane arrives,
  // and so it does where masks skip.
  static constexpr bool kLanesArrive = LanesRelease(LOADING);
  __device__ __forceinline__ void Release(uint64_t* empty) {
    if (!kLanesArrive) __syncwarp();
    if (kLanesArrive || lane_ == 0) BarrierArrive(empty);
  }

  // ---------------------------------------------------------------- products

  // S = Q K^T of the next key tile, when it is this warpgroup's turn.
  __device__ __forceinline__ void IssueScores() {
    BarrierWait(&sm_.k_full[k_.stage], k_.parity);
    if (LoadsRows(LOADING)) FenceAsyncProxy();
    WaitTurn();
    const uint64_t q = DescribeKMajor(SharedAddress(sm_.q[q_.stage]) + group_ * 64 * Memory::kPanelRowsBytes);
    const uint64_t k = DescribeKMajor(SharedAddress(sm_.k[k_.stage]));
    WgmmaFence();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      Wgmma<T>::SS(s_, q + ((i / 4 * Memory::kQPanelBytes + i % 4 * 32) >> 4),
                   k + ((i / 4 * Memory::kKeyPanelBytes + i % 4 * 32) >> 4), i > 0);
    }
    WgmmaCommit();
  }

  // The scores are there: K's stage, and after the last step Q's, may be filled again.
  __device__ __forceinline__ void TakeScores(bool last) {
    KeepInPlace(s_);
    Release(&sm_.k_empty[k_.stage]);
    k_.Advance(SHAPE::kStages);
    if (last) {
      BarrierArrive(&sm_.q_empty[q_.stage]); // each lane: they have read the tile's description too
      q_.Advance(SHAPE::kQStages);
    }
  }

  // O (+)= P V. The turn is passed before the last products are issued: the other warpgroup takes some 150 cycles from
  // there to its first product, and each of these 64 (d128).
  template <bool PASS_TURN>
  __device__ __forceinline__ void IssueValues(bool accumulate) {
    BarrierWait(&sm_.v_full[v_.stage], v_.parity);
    if (LoadsRows(LOADING)) FenceAsyncProxy();
    const uint64_t v = DescribeNMajor(SharedAddress(sm_.v[v_.stage]), Memory::kKeyPanelBytes);
    WgmmaFence();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      if (PASS_TURN && i == kKeys / 16 - SHAPE::kEarlyTurn) PassTurn();
      Wgmma<T>::RS(o_, weights_ + 4 * i, v + (i * 16 * Memory::kPanelRowsBytes >> 4), i > 0 ? 1 : accumulate);
    }
    WgmmaCommit();
    if (PASS_TURN && SHAPE::kEarlyTurn == 0) PassTurn();
  }

  __device__ __forceinline__ void TakeValues() {
    KeepInPlace(o_);
    Release(&sm_.v_empty[v_.stage]);
    v_.Advance(SHAPE::kStages);
  }

  // ---------------------------------------------------------------- softmax

  // Weights of a tile's first step: references are its maxima.
  __device__ __forceinline__ void FirstWeights(const KeyTile& key_tile) {
    if (ModeOf(key_tile) != KeyMode::kPlain) Mask(key_tile, ModeOf(key_tile));
    const bool means = IsMeans(ModeOf(key_tile));
    float grow[2], reference[2], part[2] = {0, 0};
    Follow(3, grow, means);
    ReferencesOf(reference, means);
    Weights<0, kKeys / 8>(weights_, reference, part);
    sum_[0] = part[0];
    sum_[1] = part[1];
  }

  // Weights of a later step. They are taken against the old references, without a look at the scores: where that makes
  // a lane's sum too large, the step is done again with the row's maximum, for which the scores are kept. So no maximum
  // stands in the common way, and P V of the step before has half of the exponentials as its shadow.
  __device__ __forceinline__ void NextWeights(const KeyTile& key_tile, KeyMode mode, int rows) {
    constexpr int kHalf = kKeys / 16; // of the step's groups of 8 columns
    float reference[2] = {max_[0] * p_.exponent_scale, max_[1] * p_.exponent_scale};
    if (mode != KeyMode::kPlain) {
      Mask(key_tile, mode);
      if (IsMeans(mode)) {
        reference[0] -= p_.mean_bias_log2;
        reference[1] -= p_.mean_bias_log2;
      }
    }
    float part[2] = {0, 0};
    uint32_t early[2 * kHalf]; // P V still reads weights_
    Weights<0, kHalf>(early, reference, part);
    HoldBack(part[0], part[1], p_.minus_one, &sm_.never_written);
    WgmmaWait<0>();
    TakeValues();
#pragma unroll
    for (int i = 0; i < 2 * kHalf; ++i) weights_[i] = OpaqueCopy(early[i], p_.zero);
    Weights<kHalf, 2 * kHalf>(weights_ + 2 * kHalf, reference, part);
    // Not a number counts as large: a row that has seen nothing yet has the reference -inf.
    int large = (part[0] < kLargestSum<T> ? 0 : 1) | (part[1] < kLargestSum<T> ? 0 : 2);
    if (__any_sync(~0u, large) && __any_sync(~0u, large & RowsExist(rows))) {
      large |= __shfl_xor_sync(~0u, large, 1);
      large |= __shfl_xor_sync(~0u, large, 2);
      float grow[2];
      const bool means = IsMeans(KeyTileBefore(1).mode); // asked again: no register holds it till here
      Follow(large, grow, means);
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o_[i] *= grow[i / 2 % 2];
      ReferencesOf(reference, means);
      part[0] = part[1] = 0;
      Weights<0, 2 * kHalf>(weights_, reference, part);
      sum_[0] *= grow[0];
      sum_[1] *= grow[1];
    }
    sum_[0] += part[0];
    sum_[1] += part[1];
  }

  // A mean counts for a block of keys.
  __device__ __forceinline__ void ReferencesOf(float (&reference)[2], bool means) const {
    References(max_, p_.exponent_scale, means ? p_.mean_bias_log2 : 0, reference);
  }

  __device__ __forceinline__ void Follow(int moves, float (&grow)[2], bool means) {
    FollowMaxima<kKeys / 8>(s_, moves, p_.exponent_scale, means ? p_.mean_bias : 0, max_, grow);
  }

  // Of columns 8 BEGIN to 8 END: the weights, packed, and their sum.
  template <int BEGIN, int END>
  __device__ __forceinline__ void Weights(uint32_t* to, const float (&reference)[2], float (&part)[2]) const {
    Weigh<T, END - BEGIN>(s_ + 4 * BEGIN, p_.exponent_scale, reference, to, part);
  }

  // The description of the step that k_ stands at, or of one that came before it.
  __device__ __forceinline__ const KeyTile& KeyTileBefore(uint32_t steps) const {
    return sm_.key_tiles[(k_.stage + k_.parity * SHAPE::kStages - steps) % Memory::kKeyTiles];
  }

  __device__ __forceinline__ static KeyMode ModeOf(const KeyTile& key_tile) {
    return kGathers ? key_tile.ModeOfBoth() : key_tile.mode;
  }
  __device__ __forceinline__ static bool IsMeans(KeyMode mode) { return !kGathers && mode == KeyMode::kMeans; }

  __device__ __forceinline__ void Mask(const KeyTile& key_tile, KeyMode mode) {
    if constexpr (kGathers) {
      if (mode != KeyMode::kListed) MaskKeys<kKeys>(s_, key_tile, last_key_, lane_);
      if (mode != KeyMode::kMasked) MaskUnwanted<kKeys>(s_, key_tile, lane_);
    } else if (mode == KeyMode::kMasked) {
      MaskKeys<kKeys>(s_, key_tile, last_key_, lane_);
    } else {
      MaskUnwanted<kKeys>(s_, key_tile, lane_);
      if (key_tile.short_column >= 0) WeighShortMean(key_tile);
    }
  }

  __device__ __forceinline__ void WeighShortMean(const KeyTile& key_tile) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) {
      float* const s = s_ + i / 2 * 4 + i % 2;
      const float bias = i / 2 * 8 + lane_ % 4 * 2 + i % 2 == key_tile.short_column ? key_tile.short_bias : 0;
      s[0] += bias;
      s[2] += bias;
    }
  }

  __device__ __forceinline__ void Store(const TileInfo& tile) {
    StoreTile<T, SHAPE>(p_, sm_, tile, out_, [&](int r) {
      const float sum = r == 0 ? sum_[0] : sum_[1], reference = r == 0 ? max_[0] : max_[1];
      return LogSum(reference, sum, p_.exponent_scale);
    });
  }

  const AttendParams& p_;
  SharedMemory<SHAPE>& sm_;
  const int group_; // 0 or 1: which math warpgroup
  const int lane_;
  const int row_; // of the tile: this lane's first; the other one is 8 below
  RingPosition q_;
  RingPosition k_, v_;

  float s_[kKeys / 2];          // scores, then weights
  float o_[kHeadDim / 2];       // unnormalised output
  uint32_t weights_[kKeys / 4]; // P, packed
  uint32_t out_[kHeadDim / 4];  // O, normalised and packed
  int last_key_[2];
  float max_[2], sum_[2]; // the reference maximum, raw; this lane's part of the sum
};

// The two sides of a kernel and what they share; of masks that skip: skip.cuh.
template <class T, class SHAPE, Loading LOADING>
struct Sides {
  using Math = AttendMath<T, SHAPE, LOADING>;
  using Producer = AttendProducer<SHAPE, LOADING>;
  using Memory = SharedMemory<SHAPE>;
};
template <class T, class SHAPE>
struct Sides<T, SHAPE, Loading::kGather> {
  using Math = AttendMath<T, SHAPE, Loading::kGather>;
  using Producer = GatherProducer<SHAPE>;
  using Memory = GatherMemory<SHAPE>;
};

template <class T, class SHAPE, Loading LOADING>
__global__ void __launch_bounds__(kAttendThreads, 1) AttendSm90(const __grid_constant__ AttendParams p) {
  using Side = Sides<T, SHAPE, LOADING>;
  using Producer = typename Side::Producer;
  extern __shared__ uint8_t raw[];
  auto& sm = *reinterpret_cast<typename Side::Memory*>(raw + (1024 - (SharedAddress(raw) & 1023)) % 1024);
  // Set up barriers.
  if (threadIdx.x == 0) {
    if constexpr (LOADING == Loading::kAscending) {
      for (TileSkipped& one : sm.skipped) one.pairs = 0;
      for (int i = 0; i < 2 * SHAPE::kStages; ++i) BarrierInit(&sm.decided[0][0] + i, 4); // a warpgroup's warps
    }
    constexpr int kReleases = LanesRelease(LOADING) ? kMathThreads : kMathThreads / 32;
    constexpr int kFullArrivals = Producer::kFullArrivals;
    BarrierInit(&sm.work_full, 32);
    BarrierInit(&sm.work_empty, Producer::kLoaders * 32);
    for (int i = 0; i < SHAPE::kQStages; ++i) {
      BarrierInit(&sm.q_full[i], 1);
      BarrierInit(&sm.q_empty[i], kMathThreads);
    }
    for (int i = 0; i < SHAPE::kStages; ++i) {
      BarrierInit(&sm.k_full[i], kFullArrivals);
      BarrierInit(&sm.v_full[i], kFullArrivals);
      BarrierInit(&sm.k_empty[i], kReleases);
      BarrierInit(&sm.v_empty[i], kReleases);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  // Select's results, if this launch was let in before its end. Beside the kernel before it, they have been there since
  // that one began; what is in L1 may be older.
  if (p.beside) {
    __threadfence();
  } else {
    GridWait();
  }
  // Split up: one warpgroup loads, two compute.
  if (threadIdx.x < 128) {
    ShrinkRegisters<SHAPE::kProducerRegisters>();
    if (threadIdx.x < Producer::kThreads) Producer(p, sm).Run();
  } else {
    GrowRegisters<SHAPE::kMathRegisters>();
    typename Side::Math(p, sm).Run();
    BulkStoresDone();
    GridWait(); // who waits for this kernel counts on the one before it too; behind the split it made ptxas spill
  }
}

template <class T, class SHAPE>
AttendKernelSet KernelsOf() {
  return {AttendSm90<T, SHAPE, Loading::kTiles>, AttendSm90<T, SHAPE, Loading::kChunks>,
          AttendSm90<T, SHAPE, Loading::kRows>, static_cast<int>(sizeof(SharedMemory<SHAPE>)) + kOperandAlign};
}

template <class T, class SHAPE>
OneAttendKernel GatherKernelOf() {
  constexpr int kBytes = static_cast<int>(sizeof(GatherMemory<SHAPE>)) + kOperandAlign;
  static_assert(kBytes <= 227 * 1024, "the shared memory that a CTA may have");
  return {AttendSm90<T, SHAPE, Loading::kGather>, kBytes};
}

// The content of an instantiation file: a dtype's kernels for a head dimension.
#define FLASHPREFILL_INSTANTIATE_ATTEND(T, HEAD_DIM) \
  template <>                                        \
  AttendKernelSet AttendKernels<T, HEAD_DIM>() {     \
    return KernelsOf<T, AttendShape<HEAD_DIM>>();    \
  }

// The same for masks with key lists.
#define FLASHPREFILL_INSTANTIATE_GATHER(T, HEAD_DIM)   \
  template <>                                          \
  OneAttendKernel AttendGatherKernel<T, HEAD_DIM>() {  \
    return GatherKernelOf<T, AttendShape<HEAD_DIM>>(); \
  }

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_ATTEND_CUH_
