// The guard's audit: all scores of a few rows of queries, and how much of each row's softmax lies on keys that the mask
// leaves out. For every GPU since Ampere; on Hopper too, since the rows are so few that reading the keys is the larger
// part.
//
// A CTA takes the rows of one KV head's query heads, up to 256 of them, and a run of keys, so that each key is read
// once or twice for all rows, and every multiprocessor has some. Keys stream through two stages of shared memory, a
// barrier per step; a warp has 32 rows and holds their queries in registers, so that shared memory is read for keys
// alone. Weights are exponentials against a reference that a row keeps, the largest of its first scores, while its sums
// stay in range: the common step has no maximum. Rows of a warp are neighbours in the prompt, so that only a few steps
// need a mask, and a warp whose rows see no more keys is done.
//
// Of each row three sums leave the kernel (RowPart): all weights, those of keys left out, and of the blocks left out
// the heaviest one's. Their order is fixed, whatever else runs: no atomics.
#ifndef FLASHPREFILL_CUDA_SM80_GUARD_AUDIT_CUH_
#define FLASHPREFILL_CUDA_SM80_GUARD_AUDIT_CUH_

#include "cuda/common/grid_control.cuh"
#include "cuda/common/numbers.cuh"
#include "cuda/sm80/guard/audit_plan.cuh"
#include "cuda/sm80/mma.cuh"

namespace flashprefill::cuda {

constexpr int kPartKeys = 64;               // whose scores are in registers at a time
constexpr int kGroups = 4, kGroupKeys = 16; // of a part: no block ends inside of 16 keys
constexpr int kNoLimit = 0x7fffffff;
constexpr float kMostOfPart = 0x1p40f; // of a lane's sum over a part: fp32 bears many of them

template <class T, class SHAPE>
class AuditRun {
 public:
  __device__ __forceinline__ AuditRun(const GuardArgs& a, AuditRows<SHAPE>& rows, uint32_t memory)
      : a_(a), p_(a.d.p), rows_(rows), memory_(memory), lane_(threadIdx.x % 32), warp_(threadIdx.x / 32) {
    int unit = static_cast<int>(blockIdx.x);
    const int units = p_.batch * p_.kv_heads, in_tile = units * a.pieces;
    tile_ = a.row_tiles - 1 - unit / in_tile; // the last rows see the most
    unit %= in_tile;
    piece_ = unit / units;
    unit %= units;
    kv_ = unit % p_.kv_heads;
    s_ = SequenceAt(a.d, unit / p_.kv_heads);
  }

  __device__ __forceinline__ void Run() {
    PlaceRows();
    __syncthreads();
    int most = 0;
#pragma unroll
    for (int w = 0; w < SHAPE::kWarps; ++w) most = max(most, rows_.most_seen[w]);
    if (most == 0) return; // no row is there
    most_seen_ = most;
    steps_ = AuditSteps<kKeys>::Of(a_, most, piece_);
    Start();
    if (steps_.begin < steps_.end) Steps();
    Store();
  }

 private:
  static constexpr int kRowTiles = SHAPE::kRowTiles;
  static constexpr int kKeys = SHAPE::kKeys;
  static constexpr int kSlices = SHAPE::kHeadDim / 16;
  static constexpr int kKeyPanel = kKeys * kRowBytes; // bytes
  static constexpr int kQueryPanel = SHAPE::kRows * kRowBytes;
  static constexpr int kPieces = SHAPE::kHeadDim / 8; // of 16 bytes per row
  static constexpr int kRowsAtOnce = SHAPE::kThreads / kPieces;
  using Scores = float[kRowTiles][kPartKeys / 8][4];

  // ---------------------------------------------------------------- what there is to do

  // A lane finds its row of the warp's.
  __device__ __forceinline__ void PlaceRows() {
    const int at = warp_ * SHAPE::kWarpRows + lane_ % SHAPE::kWarpRows;
    const int u = tile_ * SHAPE::kRows + at, j = u / a_.group;
    const int head = kv_ * a_.group + u - j * a_.group;
    int seen = 0;
    if (j < a_.most_rows && j < a_.heads[s_.index * p_.q_heads + head].strata) {
      const int64_t place = GuardRowBase(a_, s_.index, head) + j;
      const int row = a_.drawn[place];
      seen = GuardKeysSeen(a_, s_, row);
      if (lane_ < SHAPE::kWarpRows) {
        rows_.head[at] = head;
        rows_.row[at] = row;
        rows_.mask_row[at] = GuardMaskRow(a_, s_, head, a_.rules.by_tile(row)) * a_.words;
        rows_.list[at] = place * a_.listed_words;
      }
    }
    if (lane_ < SHAPE::kWarpRows) rows_.seen[at] = seen;
    warp_most_ = __reduce_max_sync(~0u, seen);
    warp_least_ = __reduce_min_sync(~0u, seen > 0 ? seen : kNoLimit);
    if (lane_ == 0) rows_.most_seen[warp_] = warp_most_;
  }

  // ---------------------------------------------------------------- copies

  // The stage of a step, so that the queries of few rows lie beside the first.
  __device__ __forceinline__ uint32_t StageOf(int i) const {
    return memory_ + ((i - steps_.begin + 1) & 1) * SHAPE::kStageBytes;
  }

  __device__ __forceinline__ void LoadKeys(int i) const {
    const AuditStep step = steps_.At(i);
    const int first = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    const bool wanted = piece * 8 < p_.head_dim;
    const T* const data = static_cast<const T*>(p_.k.data) + (wanted ? piece * 8 : 0);
    const int end = min(step.key + step.keys, most_seen_);
    uint32_t to = StageOf(i) + piece / 8 * kKeyPanel;
#pragma unroll
    for (int row = first; row < kKeys; row += kRowsAtOnce) {
      const int key = step.key + row;
      const bool valid = wanted && key < end;
      AsyncCopy16(to + row * kRowBytes + ((piece % 8 ^ row % 8) << 4),
                  valid ? data + KeyOffsetAt(p_, p_.k.stride, s_, key, kv_) : data, valid);
    }
    AsyncCopyCommit();
  }

  __device__ __forceinline__ void LoadQueries() const {
    const int first = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    const T* const data = static_cast<const T*>(p_.q.data);
    const uint32_t to = memory_ + piece / 8 * kQueryPanel;
#pragma unroll 4
    for (int row = first; row < SHAPE::kRows; row += kRowsAtOnce) {
      const bool valid = rows_.seen[row] > 0 && piece * 8 < p_.head_dim;
      const T* from = data;
      if (valid) from += RowOffsetAt(p_, p_.q.stride, s_, rows_.row[row], rows_.head[row]) + piece * 8;
      AsyncCopy16(to + row * kRowBytes + ((piece % 8 ^ row % 8) << 4), from, valid);
    }
    AsyncCopyCommit();
  }

  // Queries into registers, and the first keys on their way.
  __device__ __forceinline__ void Start() {
    constexpr bool kBeside = SHAPE::kQueryBytes == SHAPE::kStageBytes;
    LoadQueries();
    if (kBeside && steps_.begin < steps_.end) LoadKeys(steps_.begin);
    if (kBeside && steps_.begin < steps_.end) {
      AsyncCopyWait<1>();
    } else {
      AsyncCopyWait<0>();
    }
    __syncthreads();
    const uint32_t from = RowsOfA(memory_, warp_ * SHAPE::kWarpRows);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int k = 0; k < kSlices; ++k) {
        LoadMatrix4(q_[m][k], Piece(from, k) + k / 4 * kQueryPanel + m * 16 * kRowBytes);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        reference_[m][r] = -INFINITY;
        total_[m][r] = missed_[m][r] = of_block_[m][r] = most_[m][r] = 0;
        heaviest_[m][r] = -1;
      }
    }
    block_ = -1;
    if (!kBeside && steps_.begin < steps_.end) {
      __syncthreads(); // all have their queries
      LoadKeys(steps_.begin);
    }
  }

  // ---------------------------------------------------------------- scores and sums

  __device__ __forceinline__ void Steps() {
#pragma unroll 1
    for (int i = steps_.begin; i < steps_.end; ++i) {
      AsyncCopyWait<0>();
      __syncthreads(); // the step's keys are there for all, and all have done with the other stage
      if (i + 1 < steps_.end) LoadKeys(i + 1);
      const AuditStep step = steps_.At(i);
      if (step.key >= warp_most_) continue;
#pragma unroll
      for (int part = 0; part < kKeys / kPartKeys; ++part) {
        const int key = step.key + part * kPartKeys, count = step.keys - part * kPartKeys;
        if (count > 0 && key < warp_most_) Part(StageOf(i) + part * kPartKeys * kRowBytes, key, count);
      }
    }
    EndBlock();
  }

  // 64 keys, or the first `count` of them.
  __device__ __forceinline__ void Part(uint32_t keys, int key, int count) {
    Scores s;
    Multiply(keys, s);
    if (count < kPartKeys || key + kPartKeys > warp_least_) Mask(key, count, s);
    uint64_t kept[kRowTiles][2]; // bits of the keys that lists keep
    if (a_.listed) LoadListed(key, kept);
    float left[kRowTiles][2][kGroups], all[kRowTiles][2]; // weights left out of blocks without a bit; all
    const auto weigh = [&] {
      if (a_.listed) {
        Weigh<true>(s, kept, all, left);
      } else {
        Weigh<false>(s, kept, all, left);
      }
    };
    weigh();
    bool in_range = true;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        in_range &= all[m][r] <= kMostOfPart && (reference_[m][r] > -INFINITY || SeenOf(m, r) <= key);
      }
    }
    if (__any_sync(~0u, !in_range)) {
      MoveReferences(key, all, s);
      weigh();
    }
    Count(key, min(count, kPartKeys), all, left);
  }

  __device__ __forceinline__ void Multiply(uint32_t keys, Scores& s) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kPartKeys / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][i][e] = 0;
      }
    }
    const uint32_t from = RowsOfB(keys, 0);
#pragma unroll
    for (int k = 0; k < kSlices; ++k) {
#pragma unroll
      for (int n = 0; n < kPartKeys / 16; ++n) {
        uint32_t b[4];
        LoadMatrix4(b, Piece(from, k) + k / 4 * kKeyPanel + n * 16 * kRowBytes);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          Mma<T>(s[m][2 * n], q_[m][k], b[0], b[1]);
          Mma<T>(s[m][2 * n + 1], q_[m][k], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ int RowOf(int m, int r) const {
    return warp_ * SHAPE::kWarpRows + m * 16 + r * 8 + lane_ / 4;
  }
  __device__ __forceinline__ int SeenOf(int m, int r) const { return rows_.seen[RowOf(m, r)]; }

  __device__ __forceinline__ void Mask(int key, int count, Scores& s) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int end = min(count, SeenOf(m, r) - key) - lane_ % 4 * 2;
#pragma unroll
        for (int i = 0; i < kPartKeys / 8; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (i * 8 + e >= end) s[m][i][2 * r + e] = -INFINITY;
          }
        }
      }
    }
  }

  // Bit c of a row's word: a list keeps key + c. A lane's word is shifted to its own columns.
  __device__ __forceinline__ void LoadListed(int key, uint64_t (&kept)[kRowTiles][2]) const {
    const int word = key / 64, shift = key % 64;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        kept[m][r] = 0;
        if (SeenOf(m, r) <= key) continue;
        const uint64_t* const from = a_.listed + rows_.list[RowOf(m, r)] + word;
        uint64_t bits = __ldg(from) >> shift;
        if (shift > 0 && (word + 1) * 64 < SeenOf(m, r)) bits |= __ldg(from + 1) << (64 - shift);
        kept[m][r] = bits >> (lane_ % 4 * 2);
      }
    }
  }

  // Weights of a part, added up: over a lane's columns of each group those that no list keeps, and all.
  template <bool LISTED>
  __device__ __forceinline__ void Weigh(const Scores& s, const uint64_t (&kept)[kRowTiles][2],
                                        float (&all)[kRowTiles][2], float (&left)[kRowTiles][2][kGroups]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float reference = reference_[m][r] == -INFINITY ? 0 : reference_[m][r];
        float listed = 0;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          left[m][r][g] = 0;
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const float weight = Exp2(fmaf(s[m][2 * g + c / 2][2 * r + c % 2], scale(), -reference));
            if (LISTED && kept[m][r] >> (16 * g + 8 * (c / 2) + c % 2) & 1) {
              listed += weight;
            } else {
              left[m][r][g] += weight;
            }
          }
        }
        all[m][r] = (left[m][r][0] + left[m][r][1]) + (left[m][r][2] + left[m][r][3]);
        if (LISTED) all[m][r] += listed;
      }
    }
  }

  // Rows whose sums leave the range, and those that have no reference yet, take the largest of these scores for one.
  // Scores that are no finite numbers count nothing from here on.
  __device__ __forceinline__ void MoveReferences(int key, const float (&all)[kRowTiles][2], Scores& s) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float top = -INFINITY;
#pragma unroll
        for (int i = 0; i < kPartKeys / 8; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[m][i][2 * r + e];
            if (!IsFinite(x)) x = -INFINITY;
            top = fmaxf(top, x);
          }
        }
        int moves = !(all[m][r] <= kMostOfPart) || reference_[m][r] == -INFINITY;
        moves |= __shfl_xor_sync(~0u, moves, 1);
        moves |= __shfl_xor_sync(~0u, moves, 2);
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2)) * scale();
        if (!moves || !(top > reference_[m][r])) continue;
        const float shrink = Exp2(reference_[m][r] - top); // 0 from -inf
        reference_[m][r] = top;
        total_[m][r] *= shrink;
        missed_[m][r] *= shrink;
        of_block_[m][r] *= shrink;
        most_[m][r] *= shrink;
      }
    }
  }

  // Adds a part's sums to the rows'. Its keys are of one block, but where blocks are small.
  __device__ __forceinline__ void Count(int key, int count, const float (&all)[kRowTiles][2],
                                        const float (&left)[kRowTiles][2][kGroups]) {
    const int size = a_.rules.block_size;
    const bool one_block = steps_.blocks_per_step == 1 || size % kPartKeys == 0;
    BeginBlock(a_.rules.by_block(key));
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        total_[m][r] += all[m][r];
        if (!one_block || KeepsBlock(m, r, key)) continue;
        of_block_[m][r] += (left[m][r][0] + left[m][r][1]) + (left[m][r][2] + left[m][r][3]);
      }
    }
    if (one_block) return;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int at = key + g * kGroupKeys;
      if (g * kGroupKeys >= count) break;
      BeginBlock(a_.rules.by_block(at));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (!KeepsBlock(m, r, at)) of_block_[m][r] += left[m][r][g];
        }
      }
    }
  }

  __device__ __forceinline__ void BeginBlock(int block) {
    if (block == block_) return;
    EndBlock();
    block_ = block;
  }

  // Whether the mask keeps the current block for a row. One that sees none of its keys from `key` on need not know.
  __device__ __forceinline__ bool KeepsBlock(int m, int r, int key) const {
    if (SeenOf(m, r) <= key) return true;
    const auto* const words = reinterpret_cast<const uint32_t*>(a_.bits + rows_.mask_row[RowOf(m, r)]);
    return words[block_ >> 5] >> (block_ & 31) & 1;
  }

  // What was left out of the current block is known, for all of a row's lanes.
  __device__ __forceinline__ void EndBlock() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = of_block_[m][r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        missed_[m][r] += sum;
        if (sum > most_[m][r]) {
          most_[m][r] = sum;
          heaviest_[m][r] = block_;
        }
        of_block_[m][r] = 0;
      }
    }
  }

  __device__ __forceinline__ void Store() {
    const int64_t unit = (int64_t{s_.index} * p_.kv_heads + kv_) * a_.row_tiles + tile_;
    RowPart* const to = a_.parts + (unit * a_.pieces + piece_) * SHAPE::kRows;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float total = total_[m][r];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        if (lane_ % 4 == 0) {
          to[RowOf(m, r)] = RowPart{reference_[m][r], total, missed_[m][r], most_[m][r], heaviest_[m][r]};
        }
      }
    }
  }

  __device__ __forceinline__ float scale() const { return a_.exponent_scale; }

  const GuardArgs& a_;
  const Problem& p_;
  AuditRows<SHAPE>& rows_;
  const uint32_t memory_;
  const int lane_, warp_;
  DeviceSequence s_;
  int kv_, tile_, piece_;
  int warp_most_, warp_least_; // keys that rows of the warp see; the least of those that are there
  int most_seen_;              // keys that some row of the CTA sees
  AuditSteps<kKeys> steps_;
  uint32_t q_[kRowTiles][kSlices][4];
  float reference_[kRowTiles][2]; // exponent; -inf: the row has seen nothing
  float total_[kRowTiles][2];     // of a lane's columns
  float of_block_[kRowTiles][2];  // of the block that is being read, likewise: what is left out
  float missed_[kRowTiles][2];    // of ended blocks, of all lanes
  float most_[kRowTiles][2];
  int heaviest_[kRowTiles][2];
  int block_; // whose sums of_block_ are
};

template <class T, class SHAPE>
__global__ void __launch_bounds__(SHAPE::kThreads, 256 / SHAPE::kThreads)
    AuditKernel(const __grid_constant__ GuardArgs a) {
  extern __shared__ __align__(1024) char memory[];
  __shared__ AuditRows<SHAPE> rows;
  GridWait();
  GridRelease();
  if (GuardSkips(a)) return;
  AuditRun<T, SHAPE>(a, rows, SharedAddress(memory)).Run();
}

template <class T, int HEAD_DIM>
GuardAuditPlan GuardAuditOf(bool many_rows) {
  using Many = AuditShape<HEAD_DIM, kGuardManyWarps>;
  using Few = AuditShape<HEAD_DIM, kGuardFewWarps>;
  if (many_rows) return {AuditKernel<T, Many>, Many::kThreads, Many::kMemory};
  return {AuditKernel<T, Few>, Few::kThreads, Few::kMemory};
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM80_GUARD_AUDIT_CUH_
