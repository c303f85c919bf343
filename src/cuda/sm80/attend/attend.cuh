// Exact softmax attention over the kept blocks of a mask and the keys of its lists, for every NVIDIA GPU since Ampere:
// mma.sync, ldmatrix, cp.async. Persistent CTAs take query tiles of 128 rows; all warps load and all compute.
//
// Why it is fast. K and V stream through stages by asynchronous copies a step ahead, and a barrier per step (two, where
// shared memory holds one stage) is all that warps wait for each other. A warp has 32 rows where registers and shared
// memory allow it, so that every fragment of K and V that ldmatrix brings serves two products: with 16 rows, shared
// memory would be the limit of GPUs with fast matrix units. Scores come in two slices of 32 keys: the first one's
// weights are made while the matrix units still work on the second one's scores, and the second's while they add up P V
// of the first. P never leaves registers. Weights have no maximum in the common step (common/attend/row_math.cuh). The
// second CTA of the multiprocessor, or its second warp per scheduler, covers what is left.
#ifndef FLASHPREFILL_CUDA_SM80_ATTEND_ATTEND_CUH_
#define FLASHPREFILL_CUDA_SM80_ATTEND_ATTEND_CUH_

#include "cuda/common/attend/row_math.cuh"
#include "cuda/common/grid_control.cuh"
#include "cuda/sm80/attend/key_list.cuh"
#include "cuda/sm80/mma.cuh"

namespace flashprefill::cuda {

template <class T, class SHAPE>
class PortableAttendRun {
 public:
  __device__ __forceinline__ PortableAttendRun(const PortableAttendParams& p, ListControl<SHAPE>& control,
                                               uint32_t memory)
      : p_(p),
        c_(control),
        keys_(p, control),
        lane_(threadIdx.x % 32),
        warp_(__shfl_sync(~0u, threadIdx.x / 32, 0)), // so the compiler knows that a warp agrees on it
        queries_(memory),
        stages_(memory + (SHAPE::kQueriesInRegisters ? 0 : SHAPE::kQueryBytes)) {}

  __device__ __forceinline__ void Run() {
    if (warp_ == 0) {
      const int tiles = TilesOfBatch(p_);
      if (lane_ == 0) {
        c_.tiles_of_batch = tiles;
        c_.next_item = blockIdx.x;
      }
      __syncwarp();
    }
#pragma unroll 1
    while (true) {
      if (warp_ == 0) TakeTile();
      __syncthreads();
      if (c_.work.sequence < 0) return;
      Tile();
      __syncthreads(); // all have done with the tile and with shared memory
    }
  }

 private:
  static constexpr int kHeadDim = SHAPE::kHeadDim;
  static constexpr int kKeys = SHAPE::kKeys;
  static constexpr int kParts = kKeys / SHAPE::kPartKeys;
  static constexpr int kPanels = SHAPE::kPanels;
  static constexpr int kRowTiles = SHAPE::kRowTiles;
  static constexpr int kSlice = SHAPE::kSlice;
  static constexpr int kQueryPanel = kPortableRows * kRowBytes; // bytes
  static constexpr int kKeyPanel = kKeys * kRowBytes;
  static constexpr int kPieces = kHeadDim / 8; // of 16 bytes per row
  using Slice = float[kRowTiles][kSlice / 2 / 4][4];
  using Weights = uint32_t[kRowTiles][kSlice / 4];

  // ---------------------------------------------------------------- a tile

  // The next tile's work into shared memory, by the first warp.
  __device__ __forceinline__ void TakeTile() {
    const int item = c_.next_item, tiles = c_.tiles_of_batch;
    if (item < tiles * p_.kv_heads * p_.mask_heads) {
      const Work work = DecodeItem(p_, item < p_.ordered_items ? p_.order[item] : item, tiles);
      TileList list{};
      if (p_.listed.lists) list = FindList(p_, p_.listed, work);
      if (list.check && KeepsAll(p_, work)) list.end = 0;
      if (threadIdx.x == 0) {
        c_.work = work;
        c_.listed = list;
      }
    } else if (threadIdx.x == 0) {
      c_.work.sequence = -1;
    }
  }

  __device__ __forceinline__ void Tile() {
    LoadQueries();
    keys_.List(0);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        max_[m][r] = -INFINITY;
        sum_[m][r] = 0;
      }
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o_[m][i][e] = 0;
      }
    }
    if constexpr (SHAPE::kQueriesInRegisters) {
      AsyncCopyWait<0>();
      __syncthreads();
      TakeQueries();
    }
    __syncthreads(); // the list is there, and what queries came through is free
    // Kept blocks from the highest group of the mask down, then means or the segment's list. How many there are is
    // asked again, to spare a register.
#pragma unroll 1
    for (int i = 0; i < keys_.Lists(); ++i) {
      if (i > 0) {
        __syncthreads();
        keys_.List(i);
        __syncthreads();
      }
      const int steps = c_.state.steps;
      if (steps > 0) Steps(steps);
    }
    AsyncCopyWait<0>();
    StoreTile();
  }

  // One pass over a list. With two stages a step's K and V come as one group of copies while the step before is
  // computed, and one barrier per step is enough. With one, V comes during Q K^T, the next K during P V.
  __device__ __forceinline__ void Steps(int steps) {
    typename KeyList<SHAPE>::Row ahead{};
    if (keys_.Places()) {
#pragma unroll 1
      for (int j = 0; j < min(3, steps); ++j) keys_.Tell(j, keys_.Ask(j));
      if (steps > 3) ahead = keys_.Ask(3);
    }
    __syncthreads();
    Load(0, 0, steps);
    if (p_.stages == 2) Load(1, 0, steps);
    AsyncCopyCommit();
#pragma unroll 1
    for (int j = 0; j < steps; ++j) {
      WaitForCopies();
      if (p_.stages == 2) {
        Load(0, j + 1, steps);
        Load(1, j + 1, steps);
      } else {
        Load(1, j, steps);
      }
      AsyncCopyCommit();
      if (j + 3 < steps && keys_.Places()) {
        keys_.Tell(j + 3, ahead);
        if (j + 4 < steps) ahead = keys_.Ask(j + 4);
      }
      const int stage = j & (p_.stages - 1);
      const uint32_t k = stages_ + 2 * stage * SHAPE::kStageBytes;
      const StepControl& step = c_.step[j % kStepRing];
      const int how = step.masked | step.means << 1;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        Part(j, steps, part, k + part * SHAPE::kPartKeys * kRowBytes,
             k + SHAPE::kStageBytes + part * SHAPE::kPartKeys * kRowBytes, how);
      }
    }
  }

  // The copies that were asked for last are there, for all warps, and all have done with what was there before.
  __device__ __forceinline__ void WaitForCopies() const {
    AsyncCopyWait<0>();
    __syncthreads();
  }

  // The part of a step whose scores are in registers at a time: two slices. how: bit 0 if some row doesn't see all of
  // it, bit 1 if it is of means.
  __device__ __forceinline__ void Part(int j, int steps, int part, uint32_t k, uint32_t v, int how) {
    Slice first, second;
    Scores(k, first, second);
    if (how) Mask(j, 2 * part, first);
    Weights weights;
    WeighSlice(first, weights, how & 1);
    if (p_.stages == 1) {
      if (part == 0) AsyncCopyWait<0>(); // V is there,
      __syncthreads();                   // for all warps, and after the last part all have done with K
      if (part == kParts - 1) {
        Load(0, j + 1, steps);
        AsyncCopyCommit();
      }
    }
    AddValues(v, 0, weights);
    if (how) Mask(j, 2 * part + 1, second);
    WeighSlice(second, weights, how & 1);
    AddValues(v, 1, weights);
  }

  // ---------------------------------------------------------------- loads

  // K's rows (which = 0) or V's of a step, if there is one.
  __device__ __forceinline__ void Load(int which, int step, int steps) const {
    if (step >= steps) return;
    using Keys = KeyList<SHAPE>;
    const int row = threadIdx.x / 8, piece = threadIdx.x % 8;
    const uint32_t* const offsets = &c_.offset[which][step % kStepRing][row * Keys::kPasses];
    const auto* const base = static_cast<const uint16_t*>(c_.base[which]) + piece * 8;
    const uint32_t to = stages_ + (2 * (step & (p_.stages - 1)) + which) * SHAPE::kStageBytes + row * kRowBytes +
                        ((piece ^ row % 8) << 4);
    constexpr int kAtOnce = Keys::kPasses < 4 ? Keys::kPasses : 4;
#pragma unroll
    for (int first = 0; first < Keys::kPasses; first += kAtOnce) {
      uint32_t at[kAtOnce];
      if constexpr (kAtOnce == 4) {
        const uint4 four = LoadShared16(SharedAddress(offsets + first));
        at[0] = four.x, at[1] = four.y, at[2] = four.z, at[3] = four.w;
      } else {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) at[i] = offsets[first + i];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const bool there = at[i] != kNowhere;
        const auto* const from = static_cast<const uint16_t*>(AddUnits16(base, there ? at[i] : 0));
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          AsyncCopy16(to + panel * kKeyPanel + (first + i) * Keys::kRowsPerPass * kRowBytes,
                      from + panel * kPanelColumns, there && panel * kPanelColumns + piece * 8 < p_.head_dim);
        }
      }
    }
  }

  __device__ __forceinline__ void LoadQueries() const {
    const Work& w = c_.work;
    const int rows = w.tokens * p_.heads_per_tile, piece = threadIdx.x % 8;
    const auto* const from = static_cast<const uint16_t*>(p_.q_data) + w.sequence * p_.q_stride[0] +
                             (w.q_begin + w.begin) * p_.q_stride[1] + w.head * p_.q_stride[2] + piece * 8;
#pragma unroll 1
    for (int row = threadIdx.x / 8; row < kPortableRows; row += SHAPE::kThreads / 8) {
      const int token = TokenOf(row);
      const bool there = row < rows;
      const auto* const source =
          from + (there ? token * p_.q_stride[1] + (row - token * p_.heads_per_tile) * p_.q_stride[2] : 0);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        AsyncCopy16(queries_ + panel * kQueryPanel + row * kRowBytes + ((piece ^ row % 8) << 4),
                    source + panel * kPanelColumns, there && panel * kPanelColumns + piece * 8 < p_.head_dim);
      }
    }
    AsyncCopyCommit();
  }

  // Q's fragments into registers.
  __device__ __forceinline__ void TakeQueries() {
    const uint32_t at = RowsOfA(queries_, FirstRow());
#pragma unroll
    for (int m = 0; m < (SHAPE::kQueriesInRegisters ? kRowTiles : 0); ++m) {
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        LoadMatrix4(q_[m][k], Piece(at, k) + m * 16 * kRowBytes + k / 4 * kQueryPanel);
      }
    }
  }

  // ---------------------------------------------------------------- products

  // S = Q K^T of both slices: a fragment of Q serves the keys of both.
  __device__ __forceinline__ void Scores(uint32_t k_panel, Slice& first, Slice& second) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kSlice / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) first[m][i][e] = second[m][i][e] = 0;
      }
    }
    const uint32_t q_at = RowsOfA(queries_, FirstRow()), k_at = RowsOfB(k_panel, 0);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t loaded[kRowTiles][4];
      if constexpr (!SHAPE::kQueriesInRegisters) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          LoadMatrix4(loaded[m], Piece(q_at, k) + m * 16 * kRowBytes + k / 4 * kQueryPanel);
        }
      }
#pragma unroll
      for (int n = 0; n < SHAPE::kPartKeys / 16; ++n) {
        uint32_t b[4];
        LoadMatrix4(b, Piece(k_at, k) + n * 16 * kRowBytes + k / 4 * kKeyPanel);
        Slice& s = n < kSlice / 16 ? first : second;
        const int i = n % (kSlice / 16) * 2;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          const uint32_t(&a)[4] = SHAPE::kQueriesInRegisters ? q_[m][k] : loaded[m];
          Mma<T>(s[m][i], a, b[0], b[1]);
          Mma<T>(s[m][i + 1], a, b[2], b[3]);
        }
      }
    }
  }

  // O += P V of a slice.
  __device__ __forceinline__ void AddValues(uint32_t v_panel, int slice, const Weights& weights) {
    const uint32_t at = RowsOfA(v_panel, slice * kSlice);
#pragma unroll
    for (int k = 0; k < kSlice / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t b[4];
        LoadMatrix4Transposed(b, Piece(at, n) + k * 16 * kRowBytes + n / 4 * kKeyPanel);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          const uint32_t a[4] = {weights[m][4 * k], weights[m][4 * k + 1], weights[m][4 * k + 2],
                                 weights[m][4 * k + 3]};
          Mma<T>(o_[m][2 * n], a, b[0], b[1]);
          Mma<T>(o_[m][2 * n + 1], a, b[2], b[3]);
        }
      }
    }
  }

  // ---------------------------------------------------------------- softmax

  // Weights of a slice, against the old references, without a look at the scores; where that makes a lane's sum too
  // large, once more with the row's maximum. Not a number counts as large: a row that has seen nothing yet has the
  // reference -inf. follow: references follow the maxima in any case, so that rows of few keys give the largest one the
  // weight 1, which bf16 does not round.
  __device__ __forceinline__ void WeighSlice(const Slice& s, Weights& weights, bool follow) {
    float part[kRowTiles][2] = {};
    bool large = follow;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const float reference[2] = {max_[m][0] * p_.exponent_scale, max_[m][1] * p_.exponent_scale};
      Weigh<T, kSlice / 8>(s[m][0], p_.exponent_scale, reference, weights[m], part[m]);
      large |= !(part[m][0] < kLargestSum<T>) || !(part[m][1] < kLargestSum<T>);
    }
    if (__any_sync(~0u, large)) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        int moves = follow ? 3 : (part[m][0] < kLargestSum<T> ? 0 : 1) | (part[m][1] < kLargestSum<T> ? 0 : 2);
        moves |= __shfl_xor_sync(~0u, moves, 1);
        moves |= __shfl_xor_sync(~0u, moves, 2);
        float grow[2], reference[2];
        FollowMaxima<kSlice / 8>(s[m][0], moves, p_.exponent_scale, 0, max_[m], grow);
        References(max_[m], p_.exponent_scale, 0, reference);
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) o_[m][i][e] *= grow[e / 2];
        }
        part[m][0] = part[m][1] = 0;
        Weigh<T, kSlice / 8>(s[m][0], p_.exponent_scale, reference, weights[m], part[m]);
        sum_[m][0] *= grow[0];
        sum_[m][1] *= grow[1];
      }
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      sum_[m][0] += part[m][0];
      sum_[m][1] += part[m][1];
    }
  }

  // Leaves out keys that a row does not see, and gives means the weight of their blocks.
  __device__ __forceinline__ void Mask(int j, int slice, Slice& s) const {
    const Work& w = c_.work;
    const StepControl& step = c_.step[j % kStepRing];
    int short_column = -1;
    float bias = 0, short_bias = 0;
    if (step.means) {
      // The sequence's last block may be shorter than the others, and counts where rows see all of it: not causal.
      const int last = p_.by_block(w.k_len - 1), keys = w.k_len - last * p_.block_size;
      bias = p_.mean_bias;
      if (last < w.full && keys < p_.block_size) {
        short_column = last - step.block;
        short_bias = log2f(static_cast<float>(keys)) / p_.exponent_scale;
      }
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kSlice / 8; ++i) {
        const int column = slice * kSlice + i * 8 + lane_ % 4 * 2;
        const int2 position = *reinterpret_cast<const int2*>(&c_.position[j % kStepRing][column]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = FirstRow() + m * 16 + e / 2 * 8 + lane_ / 4;
          const int last_key = min(w.first_position + TokenOf(row), w.k_len - 1);
          const float more = column + e % 2 == short_column ? short_bias : bias;
          s[m][i][e] = (e % 2 ? position.y : position.x) > last_key ? -INFINITY : s[m][i][e] + more;
        }
      }
    }
  }

  // ---------------------------------------------------------------- out

  // The tile's rows through shared memory, so that they leave 16 bytes at a time: where the warp's own rows of Q lay,
  // or, where Q is in registers, through the stages.
  __device__ __forceinline__ void StoreTile() {
    __syncthreads(); // no warp reads the stages, no copy writes Q any more
    const int next = threadIdx.x == 0 ? atomicAdd(p_.counter, 1) + static_cast<int>(gridDim.x) : 0;
    const int thread = ThreadAgain(), lane = thread % 32, first_row = thread / 32 * 16 * kRowTiles;
    const Work& w = c_.work;
    const int rows = w.tokens * p_.heads_per_tile;
    const auto at = [&](int row, int piece) {
      return queries_ + piece / 8 * kQueryPanel + row * kRowBytes + ((piece % 8 ^ row % 8) << 4);
    };
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      uint32_t out[kHeadDim / 4];
      PackOutput<T, kHeadDim / 4>(o_[m][0], sum_[m], out);
#pragma unroll
      for (int i = 0; i < kHeadDim / 4; ++i) {
        const int row = first_row + m * 16 + i % 2 * 8 + lane / 4;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(at(row, i / 2) + lane % 4 * 4), "r"(out[i]) : "memory");
      }
      // Of four lanes that share two rows the first two write a row each.
      const int r = lane % 4, row = first_row + m * 16 + lane / 4 + 8 * r;
      if (p_.lse != nullptr && r < 2 && row < rows) {
        const int token = TokenOf(row), head = w.head + row - token * p_.heads_per_tile;
        p_.lse[w.sequence * p_.lse_stride[0] + head * p_.lse_stride[1] +
               (w.q_begin + w.begin + token) * p_.lse_stride[2]] =
            LogSum(r == 0 ? max_[m][0] : max_[m][1], r == 0 ? sum_[m][0] : sum_[m][1], p_.exponent_scale);
      }
    }
    __syncwarp();
    T* const to = static_cast<T*>(p_.out) + w.sequence * p_.out_stride[0] + (w.q_begin + w.begin) * p_.out_stride[1] +
                  w.head * p_.out_stride[2];
#pragma unroll 1
    for (int i = lane; i < 16 * kRowTiles * kPieces; i += 32) {
      const int row = first_row + i / kPieces, piece = i % kPieces;
      if (row < rows && piece * 8 < p_.head_dim) {
        const int token = TokenOf(row);
        T* const row_to = to + token * p_.out_stride[1] + (row - token * p_.heads_per_tile) * p_.out_stride[2];
        *reinterpret_cast<uint4*>(row_to + piece * 8) = LoadShared16(at(row, piece));
      }
    }
    if (thread == 0) c_.next_item = next;
  }

  // row / heads_per_tile, exact for the 128 rows of a tile.
  __device__ __forceinline__ int TokenOf(int row) const { return row * p_.token_of_row >> 16; }
  __device__ __forceinline__ int FirstRow() const { return warp_ * 16 * kRowTiles; }

  const PortableAttendParams& p_;
  ListControl<SHAPE>& c_;
  KeyList<SHAPE> keys_;
  const int lane_, warp_;
  const uint32_t queries_, stages_; // in shared memory; Q on its way to registers lies in the stages

  uint32_t q_[SHAPE::kQueriesInRegisters ? kRowTiles : 1][SHAPE::kQueriesInRegisters ? kHeadDim / 16 : 1][4];
  float o_[kRowTiles][kHeadDim / 8][4];         // unnormalised output
  float max_[kRowTiles][2], sum_[kRowTiles][2]; // references, raw; this lane's part of the sums
};

constexpr int kPortableAlign = 128; // of panels

template <class SHAPE>
constexpr int kListBytes = (sizeof(ListControl<SHAPE>) + kPortableAlign - 1) / kPortableAlign* kPortableAlign;

template <class T, class SHAPE>
__global__ void __launch_bounds__(SHAPE::kThreads, SHAPE::kCtas)
    AttendPortable(const __grid_constant__ PortableAttendParams p) {
  extern __shared__ __align__(128) uint8_t raw[];
  GridWait(); // select's results, if this launch was let in before its end
  PortableAttendRun<T, SHAPE>(p, *reinterpret_cast<ListControl<SHAPE>*>(raw), SharedAddress(raw) + kListBytes<SHAPE>)
      .Run();
}

template <class T, class SHAPE>
PortableAttendPlan PortablePlanOf() {
  return {AttendPortable<T, SHAPE>,
          SHAPE::kThreads,
          SHAPE::kKeys,
          SHAPE::kCtas,
          kListBytes<SHAPE> + (SHAPE::kQueriesInRegisters ? 0 : SHAPE::kQueryBytes),
          2 * SHAPE::kStageBytes};
}

// The content of an instantiation file: a dtype's kernel for a head dimension.
#define FLASHPREFILL_INSTANTIATE_PORTABLE_ATTEND(T, HEAD_DIM, SMALL) \
  template <>                                                        \
  PortableAttendPlan PortableAttend<T, HEAD_DIM, SMALL>() {          \
    return PortablePlanOf<T, PortableShape<HEAD_DIM, SMALL>>();      \
  }

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM80_ATTEND_ATTEND_CUH_
