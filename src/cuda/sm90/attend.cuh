// Exact softmax attention over the kept blocks of a mask, for Hopper. One persistent CTA an SM: a producer warpgroup
// (attend_producer.cuh) and two math warpgroups of 64 query rows each.
//
// Why it is fast. The matrix units are kept busy from two sides. Inside a math warpgroup, the next Q K^T is issued
// before the P V of this step and both run while the softmax of the next scores is computed. Between the two, turns
// (two named barriers) make one warpgroup's softmax fall under the other one's products. Across tiles nothing drains:
// the first Q K^T of the next tile is issued before the last P V of this one is waited for, Q of the next tile is
// already there, and O leaves through shared memory while that product runs. P never leaves registers (wgmma.cuh says
// why it needn't).
//
// The running maximum of a row is only followed when it has grown by 2^8 or more: until then exponentials are taken
// against the old one, which fp32 sums bear easily, and the 64 multiplications that rescale O are skipped.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_CUH_
#define FLASHPREFILL_CUDA_SM90_ATTEND_CUH_

#include "cuda/common/wgmma.cuh"
#include "cuda/sm90/attend_producer.cuh"

namespace flashprefill::cuda {

template <class T, class SHAPE, bool GATHER>
class AttendMath {
 public:
  __device__ __forceinline__ AttendMath(const AttendParams& p, SharedPlan<SHAPE>& shared)
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
      TakeScores(tile.key_tiles == 1);
      Softmax([] {});
      PackWeights();
      for (int j = 1; j < tile.key_tiles; ++j) {
        IssueScores();
        IssueValues(j > 1);
        PassTurn();
        WgmmaWait<1>();
        TakeScores(j + 1 == tile.key_tiles);
        const bool grown = Softmax([&] { // P V is done by now; the other half's waits are filled with packing
          HoldBack(sum_[0], sum_[1], &sm_.never_written);
          WgmmaWait<0>();
          TakeValues();
        });
        PackWeights();
        if (grown) Rescale();
      }
      const bool several = tile.key_tiles > 1;
      TileInfo next;
      if constexpr (SHAPE::kQStages > 1) {
        next = NextTile(); // asked before the products are issued: ptxas serialises them if a branch lies in between
        if (next.key_tiles == 0) break;
        IssueValues(several);
        IssueScores();
        PassTurn();
        WgmmaWait<1>();
        TakeValues();
        PackOutput();
        StoreTile(tile);
      } else { // the next Q can only come while O is written
        IssueValues(several);
        WgmmaWait<0>();
        TakeValues();
        PackOutput();
        StoreTile(tile);
        next = NextTile();
        if (next.key_tiles == 0) return;
        IssueScores();
        PassTurn();
      }
      WgmmaWait<0>();
      tile = next;
    }
    IssueValues(tile.key_tiles > 1);
    WgmmaWait<0>();
    TakeValues();
    PackOutput();
    StoreTile(tile);
  }

 private:
  static constexpr int kKeys = SHAPE::kKeys;
  static constexpr int kHeadDim = SHAPE::kHeadDim;
  using Plan = SharedPlan<SHAPE>;

  // ---------------------------------------------------------------- tiles and turns

  __device__ __forceinline__ TileInfo NextTile() {
    BarrierWait(&sm_.q_full[q_.stage], q_.parity);
    return sm_.tiles[q_.stage];
  }

  // Row numbers become the last key position that each of this lane's two rows sees.
  __device__ __forceinline__ void StartRows(const TileInfo& tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = TokenOf(row_ + 8 * r);
      last_key_[r] = min(tile.first_position + token, tile.last_key);
      max_[r] = -INFINITY;
      sum_[r] = 0;
    }
  }

  // row / heads_a_tile, exact for the 128 rows of a tile.
  __device__ __forceinline__ int TokenOf(int row) const { return row * p_.token_of_row >> 16; }

  __device__ __forceinline__ void WaitTurn() { NamedBarrierSync(kTurnBarrier + group_, kMathThreads); }
  __device__ __forceinline__ void PassTurn() { NamedBarrierArrive(kTurnBarrier + 1 - group_, kMathThreads); }

  // One arrival a warp: a warp's part of a product may be done before its neighbours'.
  __device__ __forceinline__ void Release(uint64_t* empty) {
    __syncwarp();
    if (lane_ == 0) BarrierArrive(empty);
  }

  // ---------------------------------------------------------------- products

  // S = Q K^T of the next key tile, when it is this warpgroup's turn.
  __device__ __forceinline__ void IssueScores() {
    BarrierWait(&sm_.k_full[k_.stage], k_.parity);
    if (GATHER && p_.by_rows) FenceAsyncProxy();
    WaitTurn();
    const uint64_t q = DescribeKMajor(SharedAddress(sm_.q[q_.stage]) + group_ * 64 * Plan::kPanelRowsBytes);
    const uint64_t k = DescribeKMajor(SharedAddress(sm_.k[k_.stage]));
    WgmmaFence();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      Wgmma<T>::SS(s_, q + ((i / 4 * Plan::kQPanelBytes + i % 4 * 32) >> 4),
                   k + ((i / 4 * Plan::kKeyPanelBytes + i % 4 * 32) >> 4), i > 0);
    }
    WgmmaCommit();
  }

  // The scores are there: K's stage, and after the last step Q's, may be filled again.
  __device__ __forceinline__ void TakeScores(bool last) {
    KeepInPlace(s_);
    Release(&sm_.k_empty[k_.stage]);
    k_.Advance();
    if (last) {
      Release(&sm_.q_empty[q_.stage]);
      q_.Advance();
    }
  }

  // O (+)= P V.
  __device__ __forceinline__ void IssueValues(bool accumulate) {
    BarrierWait(&sm_.v_full[v_.stage], v_.parity);
    if (GATHER && p_.by_rows) FenceAsyncProxy();
    const uint64_t v = DescribeNMajor(SharedAddress(sm_.v[v_.stage]), Plan::kKeyPanelBytes);
    WgmmaFence();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      Wgmma<T>::RS(o_, weights_ + 4 * i, v + (i * 16 * Plan::kPanelRowsBytes >> 4), i > 0 ? 1 : accumulate);
    }
    WgmmaCommit();
  }

  __device__ __forceinline__ void TakeValues() {
    KeepInPlace(o_);
    Release(&sm_.v_empty[v_.stage]);
    v_.Advance();
  }

  // ---------------------------------------------------------------- softmax

  // s_ becomes exp2 of the scaled scores against the row's reference maximum. Returns whether any row of the warp has
  // moved its reference, so that O must follow; grow_ holds by how much. `between` is called with half of them done.
  template <class Between>
  __device__ __forceinline__ bool Softmax(Between between) {
    const KeyTile& key_tile = sm_.key_tiles[ring_];
    ring_ = (ring_ + 1) % kKeyTileRing;
    if (key_tile.mode != KeyMode::kPlain) Mask(key_tile);
    float top[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) { // four chains, not one: a step of a chain takes 4 cycles or more
      float t[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) t[c] = fmaxf(s_[4 * c + 2 * r], s_[4 * c + 2 * r + 1]);
#pragma unroll
      for (int i = 4; i < kKeys / 8; ++i) {
        t[i % 4] = fmaxf(t[i % 4], fmaxf(s_[4 * i + 2 * r], s_[4 * i + 2 * r + 1]));
      }
      top[r] = fmaxf(fmaxf(t[0], t[1]), fmaxf(t[2], t[3]));
    }
    bool mine = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
      const bool grows = top[r] > max_[r] + p_.rescale_above;
      grow_[r] = grows ? Exp2((max_[r] - top[r]) * p_.scale_log2) : 1.0f;
      max_[r] = grows ? top[r] : max_[r];
      mine |= grows;
    }
    const bool grown = __any_sync(~0u, mine);
    float reference[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      reference[r] = max_[r] == -INFINITY ? 0 : max_[r] * p_.scale_log2; // a row may have seen nothing yet
      sum_[r] *= grow_[r];
    }
    Exponentials<0, kKeys / 16>(reference);
    between();
    Exponentials<kKeys / 16, kKeys / 8>(reference);
    return grown;
  }

  // Of columns 8 BEGIN to 8 END.
  template <int BEGIN, int END>
  __device__ __forceinline__ void Exponentials(const float (&reference)[2]) {
#pragma unroll
    for (int i = BEGIN; i < END; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s_[4 * i + e] = Exp2(fmaf(s_[4 * i + e], p_.scale_log2, -reference[e / 2]));
        sum_[e / 2] += s_[4 * i + e];
      }
    }
  }

  __device__ __forceinline__ void Mask(const KeyTile& key_tile) {
    if (key_tile.mode == KeyMode::kMasked) {
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        const int position = key_tile.position[i / 2] + i % 2 * 8 + lane_ % 4 * 2;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (position + e % 2 > last_key_[e / 2]) s_[4 * i + e] = -INFINITY;
        }
      }
    } else { // a block's mean stands for so many keys: log2 of that is added to the exponent
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = i * 8 + lane_ % 4 * 2 + e;
          const bool wanted = key_tile.wanted[i / 4] >> (column % 32) & 1;
          const float bias = column == key_tile.last_column ? key_tile.last_bias : key_tile.bias;
          s_[4 * i + e] = wanted ? s_[4 * i + e] + bias : -INFINITY;
          s_[4 * i + 2 + e] = wanted ? s_[4 * i + 2 + e] + bias : -INFINITY;
        }
      }
    }
  }

  __device__ __forceinline__ void PackWeights() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weights_[i] = Pack<T>(s_[2 * i], s_[2 * i + 1]);
  }

  __device__ __forceinline__ void Rescale() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o_[i] *= grow_[i / 2 % 2];
  }

  // ---------------------------------------------------------------- out

  // Normalises O and packs it, straight: ptxas lets nothing branch while it reads O beside an unfinished product.
  __device__ __forceinline__ void PackOutput() {
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum_[r] += __shfl_xor_sync(~0u, sum_[r], 1);
      sum_[r] += __shfl_xor_sync(~0u, sum_[r], 2);
      inverse[r] = __fdividef(1, sum_[r]);
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) {
      const uint32_t packed = Pack<T>(o_[2 * i] * inverse[i % 2], o_[2 * i + 1] * inverse[i % 2]);
      out_[i] = sum_[i % 2] == 0 ? 0 : packed; // a row that saw nothing
    }
  }

  __device__ __forceinline__ void StoreTile(const TileInfo& tile) {
    constexpr int kColumns = SHAPE::kOutColumns;
    constexpr int kPitch = kColumns * 2;
    const int warp = threadIdx.x / 32 - 4;
    const uint32_t stage = SharedAddress(sm_.out[warp]);
    const int first_row = row_ - lane_ / 4;
    T* const out = static_cast<T*>(p_.out) + tile.batch * p_.out_stride[0] + tile.head * p_.out_stride[2];
#pragma unroll
    for (int pass = 0; pass < kHeadDim / kColumns; ++pass) {
      __syncwarp();
      const int matrix_row = lane_ % 8 + lane_ / 8 % 2 * 8;
#pragma unroll
      for (int c = 0; c < kColumns / 8; c += 2) { // 16 columns at once: four 8x8 matrices
        const uint32_t* o = out_ + (pass * kColumns / 8 + c) * 2;
        const int piece = (c + lane_ / 16) ^ (lane_ % 8);
        StoreMatrix4(stage + matrix_row * kPitch + piece * 16, o[0], o[1], o[2], o[3]);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 16 * kColumns / 8 / 32; ++i) { // whole rows, 16 bytes a lane
        const int row = (i * 32 + lane_) / (kColumns / 8);
        const int piece = lane_ % (kColumns / 8);
        const uint4 value = LoadShared16(stage + row * kPitch + ((piece ^ row % 8) << 4));
        const int tile_row = first_row + row;
        const int column = pass * kColumns + piece * 8;
        if (tile_row < tile.rows && column < p_.head_dim) {
          const int token = TokenOf(tile_row);
          T* const to = out + (tile.token + token) * p_.out_stride[1] +
                        (tile_row - token * p_.heads_a_tile) * p_.out_stride[2] + column;
          *reinterpret_cast<uint4*>(to) = value;
        }
      }
    }
    if (p_.lse != nullptr && lane_ % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int tile_row = row_ + 8 * r;
        if (tile_row >= tile.rows) continue;
        const int token = TokenOf(tile_row);
        const int head = tile.head + tile_row - token * p_.heads_a_tile;
        constexpr float kLn2 = 0.693147180559945f;
        const float lse = sum_[r] == 0 ? -INFINITY : (max_[r] * p_.scale_log2 + log2f(sum_[r])) * kLn2;
        p_.lse[tile.batch * p_.lse_stride[0] + head * p_.lse_stride[1] + (tile.token + token) * p_.lse_stride[2]] = lse;
      }
    }
  }

  const AttendParams& p_;
  SharedPlan<SHAPE>& sm_;
  const int group_; // 0 or 1: which math warpgroup
  const int lane_;
  const int row_; // of the tile: this lane's first; the other one is 8 below
  RingPosition<SHAPE::kQStages> q_;
  RingPosition<SHAPE::kStages> k_, v_;
  int ring_ = 0; // of key_tiles

  float s_[kKeys / 2];          // scores, then weights
  float o_[kHeadDim / 2];       // unnormalised output
  uint32_t weights_[kKeys / 4]; // P, packed
  uint32_t out_[kHeadDim / 4];  // O, normalised and packed
  int last_key_[2];
  float max_[2], sum_[2], grow_[2]; // the reference maximum, raw; this lane's part of the sum
};

template <class T, class SHAPE, bool GATHER>
__global__ void __launch_bounds__(kAttendThreads, 1) AttendSm90(const __grid_constant__ AttendParams p) {
  extern __shared__ uint8_t raw[];
  auto& sm = *reinterpret_cast<SharedPlan<SHAPE>*>(raw + (1024 - (SharedAddress(raw) & 1023)) % 1024);
  if (threadIdx.x == 0) {
    constexpr int kMathWarps = kMathThreads / 32;
    constexpr int kFullArrivals = AttendProducer<SHAPE, GATHER>::kFullArrivals;
    for (int i = 0; i < SHAPE::kQStages; ++i) {
      BarrierInit(&sm.q_full[i], 1);
      BarrierInit(&sm.q_empty[i], kMathWarps);
    }
    for (int i = 0; i < SHAPE::kStages; ++i) {
      BarrierInit(&sm.k_full[i], kFullArrivals);
      BarrierInit(&sm.v_full[i], kFullArrivals);
      BarrierInit(&sm.k_empty[i], kMathWarps);
      BarrierInit(&sm.v_empty[i], kMathWarps);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ShrinkRegisters<SHAPE::kProducerRegisters>();
    if (threadIdx.x < AttendProducer<SHAPE, GATHER>::kThreads) AttendProducer<SHAPE, GATHER>(p, sm).Run();
  } else {
    GrowRegisters<SHAPE::kMathRegisters>();
    AttendMath<T, SHAPE, GATHER>(p, sm).Run();
  }
}

// What an instantiation file holds: a dtype's kernels for a head dimension.
#define FLASHPREFILL_INSTANTIATE_ATTEND(T, HEAD_DIM)                                     \
  template <>                                                                            \
  AttendKernelPair AttendKernels<T, HEAD_DIM>() {                                        \
    return {reinterpret_cast<const void*>(&AttendSm90<T, AttendShape<HEAD_DIM>, false>), \
            reinterpret_cast<const void*>(&AttendSm90<T, AttendShape<HEAD_DIM>, true>),  \
            sizeof(SharedPlan<AttendShape<HEAD_DIM>>) + 1024}; /* room to align */       \
  }

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_CUH_
