// Attention in 8 bits over the kept blocks of a mask, for Hopper: Q K^T in int8, P V in e4m3, at twice the rate of the
// 16-bit products and with half the bytes. As in the bf16 kernel (../attend/attend.cuh) there are two math warpgroups
// that take turns, and no maximum in the common step.
//
// What differs, and why.
//  - A step's products and its exponentials take equally long, 1,024 cycles, so one warpgroup's products must run under
//    the other's softmax all the time. Issuing takes 130 cycles only: a turn that ends there leaves both waiting for
//    the matrix units and then both for exponentials. So a turn ends when its scores are there.
//  - In a turn P V of the step before comes first, then Q K^T of this one. P V is added up while Q K^T runs, and its 64
//    registers are free for exponentials on their way. With Q K^T first, six registers were left for them, and the
//    exponentials waited for each other.
//  - Scores are integers: the products of a row of Q, rounded here with a scale of its own, and of keys less a center,
//    rounded by the pass before with a scale per 128 (common/attend/images.h). Their sums begin as the bits of 1.5 *
//    2^23, which makes them floats, that plus the sum, exactly; one multiply-add then makes the exponent of any of
//    them. The 64 moves that this takes fit between the issue of P V and that of Q K^T.
//  - Weights are e4m3, which ends at 448 and at 2^-9. A row's reference is three octaves below its first maximum, so a
//    lane's 32 weights sum to at most 256 where all are equal; at 448 the row moves its reference.
//  - Hopper adds up e4m3 products with some 14 bits. So every step's P V is a sum of its own, and goes to fp32
//  registers
//    with the scale of its values: one multiply-add per value and step, and long flat rows stay exact.
//  - Registers are S 64, P V 64, O 64, P 16: what a row has beside them lies in shared memory, and positions in the
//    rings follow from one count of steps.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_ATTEND_CUH_
#define FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_ATTEND_CUH_

#include "cuda/common/numbers.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/sm90/attend/math_side.cuh"
#include "cuda/sm90/attend_8bit/producer.cuh"
#include "cuda/sm90/attend_8bit/rows16.cuh"

namespace flashprefill::cuda {

constexpr int32_t kScoreBits = 0x4b400000; // of 1.5 * 2^23: with an integer below 2^22 added to them, of that number
                                           // plus the integer, exactly
constexpr float kScoreBias = 12582912.0f;  // that number
constexpr float kWeightOctaves = 3;        // of the largest weight of a row's first step
constexpr float kLargestSum8 = 432;        // of a lane's weights in a step: below it none becomes 448 or more

template <class T, class SHAPE>
class Attend8Math {
 public:
  __device__ __forceinline__ Attend8Math(const Attend8Params& p, SharedMemory8<SHAPE>& shared)
      : p_(p),
        sm_(shared),
        group_(__shfl_sync(~0u, threadIdx.x / 128, 0) - 1), // so the compiler knows that a warp agrees on it
        state_(SharedAddress(&shared.rows.scale[threadIdx.x - (kAttendThreads - kMathThreads)])) {}

  __device__ __forceinline__ void Run() {
    if (group_ == 1) NamedBarrierArrive(kTurnBarrier, kMathThreads); // the first turn is the first group's
    int steps = NextTile();
    if (steps == 0) return;
    RoundQueries();
    WaitFor(sm_.k_full, step_);
    WaitTurn();
    BeginScores();
    IssueScores();
    PassTurn();
    WgmmaWait<0>();
    while (true) { // here the first scores of the tile are there, and no product is in flight
      TakeScores();
      FirstWeights();
      WaitFor(sm_.v_full, step_ - 1);
      if (steps > 1) WaitFor(sm_.k_full, step_);
      for (int j = 1; j < steps; ++j) {
        const ScaledKeyTile& key_tile = KeyTileBefore(0);
        const KeyMode mode = ModeOf(key_tile); // asked before the turn, as is what scores are worth: no turn is longer
                                               // for it
        const Worth worth = WorthOf(key_tile, mode);
        const float v_scale = KeyTileBefore(1).v.scale;
        const float2 reference = Load(sm_.rows.reference);
        const float addend[2] = {Addend(reference.x, worth.scale[0], worth.bias, false),
                                 Addend(reference.y, worth.scale[1], worth.bias, false)};
        WaitTurn();
        IssueValues();
        BeginScores();
        IssueScores();
        WgmmaWait<1>();
        TakeValues(v_scale);
        WaitFor(sm_.v_full, step_); // now, and not in the next turn, which is to begin with products
        if (j + 1 < steps) WaitFor(sm_.k_full, step_ + 1);
        WgmmaWait<0>();
        PassTurn();
        TakeScores();
        NextWeights(key_tile, mode, worth, addend);
      }
      steps = NextTile(); // asked before the products are issued: ptxas serialises them if a branch lies in between
      if (steps == 0) break;
      IssueValues();
      RoundQueries(); // under the last products of the tile before
      WaitFor(sm_.k_full, step_);
      WaitTurn();
      BeginScores();
      IssueScores();
      PassTurn();
      WgmmaWait<1>();
      TakeValues(KeyTileBefore(1).v.scale);
      Pack();
      Store(tile_ - 2);
      WgmmaWait<0>();
    }
    IssueValues();
    WgmmaWait<0>();
    TakeValues(KeyTileBefore(1).v.scale);
    Pack();
    Store(tile_ - 1);
  }

 private:
  static constexpr int kKeys = SHAPE::kKeys;
  static constexpr int kHeadDim = SHAPE::kHeadDim;
  static constexpr int kSlices = kKeys / 32; // of a step: what a product of P V takes
  using Memory = SharedMemory8<SHAPE>;

  // ---------------------------------------------------------------- places

  // This thread's number on the math side, from the one address that it keeps; computed where it is needed.
  __device__ __forceinline__ int Thread() const {
    return static_cast<int>((OpaqueCopy(state_, p_.zero) - SharedAddress(&sm_.rows.scale[0])) / sizeof(float2));
  }
  __device__ __forceinline__ int Lane() const { return Thread() % 32; }
  // Of the tile: this lane's first row; the other one is 8 below.
  __device__ __forceinline__ int Row() const {
    const int thread = Thread();
    return thread / 32 * 16 + thread % 32 / 4;
  }
  // This thread's element of a RowStates array.
  __device__ __forceinline__ float2 Load(const float2 (&array)[kMathThreads]) const {
    return LoadShared8(state_ + OffsetOf(array));
  }
  __device__ __forceinline__ void Save(const float2 (&array)[kMathThreads], float first, float second) const {
    StoreShared8(state_ + OffsetOf(array), __float_as_uint(first), __float_as_uint(second));
  }
  __device__ __forceinline__ uint32_t OffsetOf(const float2 (&array)[kMathThreads]) const {
    return static_cast<uint32_t>(reinterpret_cast<const char*>(&array) - reinterpret_cast<const char*>(&sm_.rows));
  }

  // step_ counts the scores that were taken; P V of a step is issued and taken when some more were.
  __device__ __forceinline__ static int Stage(uint32_t step) { return step % SHAPE::kStages; }
  __device__ __forceinline__ static uint32_t Parity(uint32_t step) { return step / SHAPE::kStages & 1; }
  __device__ __forceinline__ const ScaledKeyTile& KeyTileBefore(uint32_t steps) const {
    return sm_.key_tiles[(step_ - steps) % Memory::kKeyTiles];
  }

  // The next tile's steps. tile_ counts those whose Q was rounded.
  __device__ __forceinline__ int NextTile() {
    BarrierWait(&sm_.q_full[0], tile_ & 1);
    return sm_.tiles[tile_ % Memory::kTiles].key_tiles;
  }

  __device__ __forceinline__ void WaitTurn() { NamedBarrierSync(kTurnBarrier + group_, kMathThreads); }
  __device__ __forceinline__ void PassTurn() { NamedBarrierArrive(kTurnBarrier + 1 - group_, kMathThreads); }

  // One arrival per warp: a warp's part of a product may be done before its neighbours'.
  __device__ __forceinline__ void Release(uint64_t* empty) {
    __syncwarp();
    if (ElectOne()) BarrierArrive(empty);
  }

  // ---------------------------------------------------------------- queries

  // This warp's 16 rows of Q to int8, each with a scale of its own, and their products with the keys' center. A lane
  // has a quarter of two rows. No other warp reads these rows, in products neither.
  __device__ __forceinline__ void RoundQueries() {
    const int thread = Thread(), quarter = thread % 4, odd = thread / 4 % 2;
    const int row = thread / 32 * 16 + thread % 32 / 4;
    float scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint4 raw[4]; // 8 columns each
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        raw[i] = LoadShared16(SharedAddress(sm_.q[0]) + RawOffset(row + 8 * r, i, quarter, odd));
      }
      bool finite;
      const float largest = LargestOfRow<T>(raw, &finite);
      const float inverse = finite ? __fdividef(127, largest) : 0;
      scale[r] = finite ? largest * (p_.exponent_scale / 127) : NAN;
      float dot = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = i / 2 * kPanelColumns + (quarter + (i % 2 ^ odd) * 4) * 8;
        const uint32_t center = SharedAddress(sm_.center) + column * 4;
        const uint4 low = LoadShared16(center), high = LoadShared16(center + 16);
        const uint32_t c[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        float x[8];
        Unpack8<T>(raw[i], x);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          dot = fmaf(x[e], __uint_as_float(c[e]), dot);
          x[e] *= inverse;
        }
        StoreShared8(SharedAddress(sm_.q8) + ImageOffset(row + 8 * r, column), PackInt8(x[0], x[1], x[2], x[3]),
                     PackInt8(x[4], x[5], x[6], x[7]));
      }
      dot += __shfl_xor_sync(~0u, dot, 1);
      dot += __shfl_xor_sync(~0u, dot, 2);
      if (quarter == r) sm_.lse_shift[tile_ & 1][row + 8 * r] = dot * p_.softmax_scale;
    }
    Save(sm_.rows.scale, scale[0], scale[1]);
    BarrierArrive(&sm_.q_empty[0]); // each lane
    ++tile_;
    FenceAsyncProxy(); // the turn's barrier follows, then the products
  }

  // Piece i of four of a lane, in Q's panels. Odd rows take the pieces of even ones in another order, so that eight
  // lanes read from all banks.
  __device__ __forceinline__ static int RawOffset(int row, int i, int quarter, int odd) {
    const int piece = quarter + (i % 2 ^ odd) * 4;
    return i / 2 * Memory::kQPanelBytes + row * Memory::kPanelRowsBytes + ((piece ^ row % 8) << 4);
  }

  // ---------------------------------------------------------------- products

  // K or V of a step.
  __device__ __forceinline__ void WaitFor(uint64_t (&full)[SHAPE::kStages], uint32_t step) {
    BarrierWait(&full[Stage(step)], Parity(step));
  }

  __device__ __forceinline__ void BeginScores() {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) s_[i] = kScoreBits;
  }

  // S = Q K^T of the next key tile.
  __device__ __forceinline__ void IssueScores() {
    const uint64_t q = DescribeKMajor(SharedAddress(sm_.q8) + group_ * 64 * kImageColumns);
    const uint64_t k = DescribeKMajor(SharedAddress(sm_.k[Stage(step_)]));
    WgmmaFence();
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) WgmmaInt8::SS(s_, q + 2 * i, k + 2 * i, true);
    WgmmaCommit();
  }

  // The scores are there: K's stage may be filled again.
  __device__ __forceinline__ void TakeScores() {
    KeepInPlace(s_);
    Release(&sm_.k_empty[Stage(step_)]);
    ++step_;
  }

  // P V of the step before the next scores.
  __device__ __forceinline__ void IssueValues() {
    const uint64_t v = DescribeKMajor(SharedAddress(sm_.v[Stage(step_ - 1)]));
    WgmmaFence();
#pragma unroll
    for (int i = 0; i < kSlices; ++i) WgmmaE4M3::RS(part_, weights_ + 4 * i, v + 2 * i, i > 0);
    WgmmaCommit();
  }

  // O += P V, times what an integer of V is worth, of the step before the next scores.
  __device__ __forceinline__ void TakeValues(float scale) {
    KeepInPlace(part_);
    Release(&sm_.v_empty[Stage(step_ - 1)]);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o_[i] = fmaf(part_[i], scale, o_[i]);
  }

  // ---------------------------------------------------------------- softmax

  // Keys that are not finite need a mask, and come with K.
  __device__ __forceinline__ static KeyMode ModeOf(const ScaledKeyTile& key_tile) {
    const KeyMode mode = key_tile.mode;
    return mode == KeyMode::kPlain && key_tile.k.any_not_finite ? KeyMode::kMasked : mode;
  }

  // What a step's scores are worth in exponents of two, and what its columns count for.
  struct Worth {
    float scale[2]; // of this lane's rows
    float bias;     // log2 of the keys that a column stands for
  };
  __device__ __forceinline__ Worth WorthOf(const ScaledKeyTile& key_tile, KeyMode mode) const {
    const float2 scale = Load(sm_.rows.scale);
    const float k_scale = key_tile.k.scale;
    return {{scale.x * k_scale, scale.y * k_scale}, mode == KeyMode::kMeans ? p_.mean_bias_log2 : 0.0f};
  }

  // The addend of exponents: a score's bias and the reference are taken away. `seen`: a row that has seen nothing has
  // the reference 0; else -inf stays, and makes sums that are not small.
  __device__ __forceinline__ static float Addend(float reference, float scale, float bias, bool seen) {
    const float from = seen && reference == -INFINITY ? 0 : reference;
    return fmaf(-kScoreBias, scale, bias - from);
  }

  // Weights of a tile's first step: references come from its maxima.
  __device__ __forceinline__ void FirstWeights() {
    const ScaledKeyTile& key_tile = KeyTileBefore(1);
    const KeyMode mode = ModeOf(key_tile);
    const Worth worth = WorthOf(key_tile, mode);
    if (mode != KeyMode::kPlain) Mask(key_tile, mode, worth);
    const float reference[2] = {MaximumOf(0, worth), MaximumOf(1, worth)};
    float addend[2], sum[2] = {0, 0};
#pragma unroll
    for (int r = 0; r < 2; ++r) addend[r] = Addend(reference[r], worth.scale[r], worth.bias, true);
    Save(sm_.rows.reference, reference[0], reference[1]);
    Weights(worth, addend, sum);
    Save(sm_.rows.sum, sum[0], sum[1]);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o_[i] = 0;
  }

  // Weights of a later step. They are taken against the old references, without a look at the scores: where that makes
  // a weight too large, the step is done again with the row's maximum, for which the scores are kept. A lane's sum says
  // where one may be, and then the packed weights where one is.
  __device__ __forceinline__ void NextWeights(const ScaledKeyTile& key_tile, KeyMode mode, const Worth& worth,
                                              const float (&addend)[2]) {
    float sum[2] = {0, 0};
    if (mode != KeyMode::kPlain) Mask(key_tile, mode, worth);
    Weights(worth, addend, sum);
    // Not a number counts as large: a row that has seen nothing yet has the reference -inf.
    int large = (sum[0] < kLargestSum8 ? 0 : 1) | (sum[1] < kLargestSum8 ? 0 : 2);
    float2 sums = Load(sm_.rows.sum);
    if (__any_sync(~0u, large)) {
      large &= Saturated() & RowsExist(Tile(tile_ - 1).rows);
      large |= __shfl_xor_sync(~0u, large, 1);
      large |= __shfl_xor_sync(~0u, large, 2);
      if (__any_sync(~0u, large)) sums = MoveReferences(large, sums, sum);
    }
    Save(sm_.rows.sum, sums.x + sum[0], sums.y + sum[1]);
  }

  // A bit for each of this lane's rows that has a weight of e4m3's largest number, 448, or that is none.
  __device__ __forceinline__ int Saturated() const {
    uint32_t any[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) any[i % 2] |= (weights_[i] + 0x02020202) & 0x80808080; // 0x7e and 0x7f
    return (any[0] ? 1 : 0) | (any[1] ? 2 : 0);
  }

  // Moves the reference of each row that `moves` names to this step's, if that is larger, and takes the weights again:
  // whether it moves depends on the row alone. Returns the sums before the step in new units, and the step's in `sum`.
  // What the step is worth is asked again, and where that stands: no register holds it till here.
  __device__ __forceinline__ float2 MoveReferences(int moves, float2 sums, float (&sum)[2]) {
    const ScaledKeyTile& key_tile = sm_.key_tiles[(OpaqueCopy(step_, p_.zero) - 1) % Memory::kKeyTiles];
    const Worth worth = WorthOf(key_tile, ModeOf(key_tile));
    const float2 before = Load(sm_.rows.reference);
    float reference[2] = {before.x, before.y}, grow[2], addend[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float top = MaximumOf(r, worth);
      const bool grows = moves >> r & 1 && top > reference[r];
      grow[r] = grows ? Exp2(reference[r] - top) : 1.0f;
      reference[r] = grows ? top : reference[r];
      addend[r] = Addend(reference[r], worth.scale[r], worth.bias, true);
      sum[r] = 0;
    }
    Save(sm_.rows.reference, reference[0], reference[1]);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o_[i] *= grow[i / 2 % 2];
    Weights(worth, addend, sum);
    return make_float2(sums.x * grow[0], sums.y * grow[1]);
  }

  // The reference that a row would take from this step: its maximum as an exponent, less what keeps weights in range.
  __device__ __forceinline__ float MaximumOf(int r, const Worth& worth) const {
    constexpr int kChains = 4; // not one: a step of a chain takes 4 cycles or more
    float t[kChains];
#pragma unroll
    for (int c = 0; c < kChains; ++c) t[c] = fmaxf(Score(4 * c + 2 * r), Score(4 * c + 2 * r + 1));
#pragma unroll
    for (int i = kChains; i < kKeys / 8; ++i) {
      t[i % kChains] = fmaxf(t[i % kChains], fmaxf(Score(4 * i + 2 * r), Score(4 * i + 2 * r + 1)));
    }
    float top = fmaxf(fmaxf(t[0], t[1]), fmaxf(t[2], t[3]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    return fmaf(top - kScoreBias, worth.scale[r], worth.bias - kWeightOctaves);
  }

  __device__ __forceinline__ float Score(int i) const { return __int_as_float(s_[i]); }

  // A step's weights, packed as A of their product, and their sums, 16 keys at a time. ptxas counts on an exponential
  // 17 cycles after its issue and puts what adds it up right there. When both warps of a scheduler take exponentials it
  // is there later, and each of the 64 is waited for. So what adds up and packs stands two portions behind, 64 cycles
  // or more, and exponents stand one ahead. Blocks of code that end with each portion keep it so.
  __device__ __forceinline__ void Weights(const Worth& worth, const float (&addend)[2], float (&sum)[2]) {
    constexpr int kPortions = kKeys / 16;
    float e[kPortions][8]; // of a portion: four columns of a row, and of the other one
#pragma unroll
    for (int i = -1; i < kPortions + 2; ++i) {
      const bool exponentials = i >= 0 && i < kPortions;
      if (exponentials) {
#pragma unroll
        for (int c = 0; c < 8; ++c) e[i][c] = Exp2(e[i][c]);
      }
      if (i + 1 < kPortions) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const int r = c / 4;
          e[i + 1][c] = fmaf(Score(8 * (i + 1) + c / 2 % 2 * 4 + 2 * r + c % 2), worth.scale[r], addend[r]);
        }
      }
      if (i >= 2) {
        const float(&done)[8] = e[i - 2];
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[c / 4] += done[c];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          weights_[2 * (i - 2) + r] = PackE4M3(done[4 * r], done[4 * r + 1], done[4 * r + 2], done[4 * r + 3]);
        }
      }
      if (exponentials) EndBlock(p_.zero);
    }
  }

  // ---------------------------------------------------------------- masks

  __device__ __forceinline__ const TileInfo& Tile(uint32_t tile) const { return sm_.tiles[tile % Memory::kTiles]; }

  __device__ __forceinline__ void Mask(const ScaledKeyTile& key_tile, KeyMode mode, const Worth& worth) {
    const int lane = Lane();
    const bool means = mode == KeyMode::kMeans; // whose V may be so too
    if (means ? key_tile.any_not_finite : key_tile.k.any_not_finite) {
      ForColumns<kKeys>(s_, (means ? key_tile.not_finite : key_tile.k.not_finite)[lane % 4], true,
                        [](int32_t* of_rows) { of_rows[0] = of_rows[2] = 0x7fffffff; });
    }
    if (mode == KeyMode::kMasked) {
      const TileInfo& tile = Tile(tile_ - 1);
      int last_key[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        last_key[r] = min(tile.first_position + TokenOf(p_, Row() + 8 * r), tile.last_key);
      }
      MaskKeys<kKeys>(s_, key_tile, last_key, lane);
    } else {
      MaskUnwanted<kKeys>(s_, key_tile, lane);
      if (key_tile.short_column >= 0) WeighShortMean(key_tile, worth);
    }
  }

  // A bias of exponents as one of scores, which may be rounded to integers.
  __device__ __forceinline__ void WeighShortMean(const ScaledKeyTile& key_tile, const Worth& worth) {
    const float bias[2] = {__fdividef(key_tile.short_bias, worth.scale[0]),
                           __fdividef(key_tile.short_bias, worth.scale[1])};
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) {
      int32_t* const s = s_ + i / 2 * 4 + i % 2;
      if (i / 2 * 8 + Lane() % 4 * 2 + i % 2 != key_tile.short_column) continue;
      s[0] = __float_as_int(__int_as_float(s[0]) + bias[0]);
      s[2] = __float_as_int(__int_as_float(s[2]) + bias[1]);
    }
  }

  // ---------------------------------------------------------------- out

  __device__ __forceinline__ void Pack() {
    const float2 sums = Load(sm_.rows.sum);
    sum_[0] = sums.x;
    sum_[1] = sums.y;
    PackOutput<T, kHeadDim / 4>(o_, sum_, out_); // straight: nothing may branch while O is read
  }

  __device__ __forceinline__ void Store(uint32_t tile) {
    StoreTile<T, SHAPE>(p_, sm_, Tile(tile), out_, [&](int r) {
      const float2 reference = Load(sm_.rows.reference);
      return LogSum(r == 0 ? reference.x : reference.y, r == 0 ? sum_[0] : sum_[1], 1) +
             sm_.lse_shift[tile & 1][Row() + 8 * r];
    });
  }

  const Attend8Params& p_;
  SharedMemory8<SHAPE>& sm_;
  const int group_;      // 0 or 1: which math warpgroup
  const uint32_t state_; // address of what this thread has in RowStates
  uint32_t step_ = 0;    // key tiles whose scores were taken
  uint32_t tile_ = 0;    // query tiles whose Q was rounded

  int32_t s_[kKeys / 2];        // scores
  float part_[kHeadDim / 2];    // P V of a step
  float o_[kHeadDim / 2];       // unnormalised output
  uint32_t weights_[kKeys / 8]; // P, packed
  uint32_t out_[kHeadDim / 4];  // O, normalised and packed
  float sum_[2];                // of a finished tile's rows
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_ATTEND_CUH_
