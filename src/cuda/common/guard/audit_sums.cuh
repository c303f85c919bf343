// What a warp of the guard's audit adds up of its 16 rows: the weights of all keys, those of keys left out, and of the
// blocks left out the heaviest one's.
//
// Weights are exponentials against a reference that a row keeps, the largest of its first scores, while its sums stay
// in range: the common step has no maximum. Four lanes share the scores of two rows (the layout of wgmma's and
// mma.sync's D); after one exchange each of them has the sum of one row, two shuffles for both, and goes on with that
// row alone: one bit of the mask, one set of sums.
#ifndef FLASHPREFILL_CUDA_COMMON_GUARD_AUDIT_SUMS_CUH_
#define FLASHPREFILL_CUDA_COMMON_GUARD_AUDIT_SUMS_CUH_

#include "cuda/common/guard/args.h"
#include "cuda/common/numbers.cuh"
#include "cuda/common/ptx.cuh"

namespace flashprefill::cuda {

// Of a row that is audited; in shared memory.
struct AuditRow {
  int seen; // keys; 0 for a row that is not there
  int head, row;
  int64_t mask_row; // of GuardArgs::bits
  int64_t list;     // of GuardArgs::listed
};

// KEYS: of a step. GROUP: keys among which no block ends, in steps of several blocks. LISTED: the mask has key lists.
template <int KEYS, int GROUP, bool LISTED>
class AuditSums {
 public:
  static constexpr int kGroups = KEYS / GROUP;
  using Scores = float[KEYS / 2];

  // rows: the warp's 16.
  __device__ __forceinline__ AuditSums(const GuardArgs& a, const AuditRow* rows) : a_(a) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      seen_[r] = rows[lane / 4 + 8 * r].seen;
      reference_[r] = -INFINITY;
      if (LISTED) list_[r] = a.listed + (seen_[r] > 0 ? rows[lane / 4 + 8 * r].list : 0);
    }
    const AuditRow& own = rows[lane / 4 + 8 * (lane & 1)];
    own_seen_ = own.seen;
    words_ = reinterpret_cast<const uint32_t*>(a.bits + (own.seen > 0 ? own.mask_row : 0));
    int seen = rows[lane % 16].seen;
    most_seen_ = __reduce_max_sync(~0u, seen);
    least_seen_ = __reduce_min_sync(~0u, seen > 0 ? seen : 0x7fffffff);
  }

  // Of the warp's rows the one that sees the most.
  __device__ __forceinline__ int most_seen() const { return most_seen_; }

  // Adds a step's scores: of `count` keys from `key` on, of one block or of several that end between groups.
  __device__ __forceinline__ void Add(Scores& s, int key, int count, bool one_block) {
    if (count < KEYS || key + KEYS > least_seen_) Mask(key, count, s);
    uint64_t kept[2][KEYS / 64]; // bits of the keys that lists keep
    if (LISTED) LoadListed(key, kept);
    float left[2][kGroups], all[2]; // weights left out of blocks without a bit; all
#pragma unroll 1
    for (bool again = false;; again = true) {
      Weigh(s, kept, all, left);
      if (again) break;
      bool in_range = true;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        in_range &= all[r] <= kMostOfStep && (reference_[r] > -INFINITY || seen_[r] <= key);
      }
      if (__all_sync(~0u, in_range)) break;
      MoveReferences(all, s);
    }
    total_ += OwnRow(all[0], all[1]);
    if (one_block) {
      float sum[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) sum[r] = LISTED || kGroups > 1 ? SumOf(left[r]) : all[r];
      Count(a_.rules.by_block(key), key, OwnRow(sum[0], sum[1]));
    } else if constexpr (kGroups > 1) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        if (g * GROUP < count)
          Count(a_.rules.by_block(key + g * GROUP), key + g * GROUP, OwnRow(left[0][g], left[1][g]));
      }
    }
  }

  // to: the parts of the warp's rows.
  __device__ __forceinline__ void Store(RowPart* to) {
    EndBlock();
    const int lane = threadIdx.x % 32, r = lane & 1;
    const float reference = r ? reference_[1] : reference_[0];
    if (lane % 4 < 2) to[lane / 4 + 8 * r] = RowPart{reference, total_, missed_, most_, heaviest_};
  }

 private:
  static constexpr float kMostOfStep = 0x1p40f; // of a lane's sum over a step: fp32 bears many of them

  __device__ __forceinline__ float scale() const { return a_.exponent_scale; }

  static __device__ __forceinline__ float SumOf(const float (&x)[kGroups]) {
    float sum = x[0];
#pragma unroll
    for (int g = 1; g < kGroups; ++g) sum += x[g];
    return sum;
  }

  // The sum over four lanes of their first row's values in even lanes, of their second row's in odd ones.
  static __device__ __forceinline__ float OwnRow(float first, float second) {
    const bool odd = threadIdx.x & 1;
    float sum = (odd ? second : first) + __shfl_xor_sync(~0u, odd ? first : second, 1);
    return sum + __shfl_xor_sync(~0u, sum, 2);
  }

  __device__ __forceinline__ void Mask(int key, int count, Scores& s) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int end = min(count, seen_[r] - key) - static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
      for (int i = 0; i < KEYS / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (i * 8 + e >= end) s[4 * i + 2 * r + e] = -INFINITY;
        }
      }
    }
  }

  // Bit c of a row's words: a list keeps key + c. A lane's words are shifted to its own columns.
  __device__ __forceinline__ void LoadListed(int key, uint64_t (&kept)[2][KEYS / 64]) const {
    const int shift = key % 64;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < KEYS / 64; ++i) {
        const int word = key / 64 + i;
        kept[r][i] = 0;
        if (seen_[r] <= word * 64) continue;
        uint64_t bits = __ldg(list_[r] + word) >> shift;
        if (shift > 0 && (word + 1) * 64 < seen_[r]) bits |= __ldg(list_[r] + word + 1) << (64 - shift);
        kept[r][i] = bits >> (threadIdx.x % 4 * 2);
      }
    }
  }

  // Weights of a step, added up: over a lane's columns of each group those that no list keeps, and all.
  __device__ __forceinline__ void Weigh(const Scores& s, const uint64_t (&kept)[2][KEYS / 64], float (&all)[2],
                                        float (&left)[2][kGroups]) const {
    constexpr int kOfGroup = GROUP / 8;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float reference = reference_[r] == -INFINITY ? 0 : reference_[r];
      float listed = 0;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        float sum[2] = {0, 0}; // of even and odd columns: shorter chains
#pragma unroll
        for (int i = g * kOfGroup; i < (g + 1) * kOfGroup; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float weight = Exp2(fmaf(s[4 * i + 2 * r + e], scale(), -reference));
            if (LISTED && kept[r][i / 8] >> (i % 8 * 8 + e) & 1) {
              listed += weight;
            } else {
              sum[e] += weight;
            }
          }
        }
        left[r][g] = sum[0] + sum[1];
      }
      all[r] = SumOf(left[r]);
      if (LISTED) all[r] += listed;
    }
  }

  // Rows whose sums leave the range, and those that have no reference yet, take the largest of these scores for one.
  // Scores that are no finite numbers count nothing from here on.
  __device__ __forceinline__ void MoveReferences(const float (&all)[2], Scores& s) {
    float shrink[2] = {1, 1};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = -INFINITY;
#pragma unroll
      for (int i = 0; i < KEYS / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * i + 2 * r + e];
          if (!IsFinite(x)) x = -INFINITY;
          top = fmaxf(top, x);
        }
      }
      int moves = !(all[r] <= kMostOfStep) || reference_[r] == -INFINITY;
      moves |= __shfl_xor_sync(~0u, moves, 1);
      moves |= __shfl_xor_sync(~0u, moves, 2);
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2)) * scale();
      if (!moves || !(top > reference_[r])) continue;
      shrink[r] = Exp2(reference_[r] - top); // 0 from -inf
      reference_[r] = top;
    }
    const float own = threadIdx.x & 1 ? shrink[1] : shrink[0];
    total_ *= own;
    missed_ *= own;
    of_block_ *= own;
    most_ *= own;
  }

  // Of the lane's row: `left` out of a block, unless the mask keeps it. Blocks come in order, a large one in steps.
  __device__ __forceinline__ void Count(int block, int key, float left) {
    if (block != block_) {
      EndBlock();
      block_ = block;
    }
    if (own_seen_ <= key) return; // words of blocks that the row does not see need not be there
    if (block >> 5 != at_word_) {
      at_word_ = block >> 5;
      word_ = __ldg(words_ + at_word_);
    }
    of_block_ += word_ >> (block & 31) & 1 ? 0 : left;
  }

  __device__ __forceinline__ void EndBlock() {
    missed_ += of_block_;
    if (of_block_ > most_) {
      most_ = of_block_;
      heaviest_ = block_;
    }
    of_block_ = 0;
  }

  const GuardArgs& a_;
  int most_seen_, least_seen_; // keys that rows of the warp see; the least of those that are there
  int seen_[2];                // by the lane's two rows of scores
  float reference_[2];         // exponent; -inf: the row has seen nothing
  const uint64_t* list_[2];
  // Of the row whose sums are the lane's.
  int own_seen_;
  const uint32_t* words_; // of the mask
  uint32_t word_ = 0;
  int at_word_ = -1;
  int block_ = -1;
  float of_block_ = 0; // left out of it so far
  float total_ = 0, missed_ = 0, most_ = 0;
  int heaviest_ = -1;
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_GUARD_AUDIT_SUMS_CUH_
