// From energies to bits, by one warp for one tile: the threshold of alpha, the smallest set of a given mass, the blocks
// of at least a given gain, the top few, joined with the forced ones. The energies of the tile lie in shared memory, so
// a pass over 1024 blocks is 32 loads a lane. There is no sort: the set of largest energies that reaches a target is
// found by halving the interval in which its smallest member lies, a pass a halving, a dozen of them. Sums are taken in
// an order that depends on the number of blocks alone, so the same input gives the same bits.
#ifndef FLASHPREFILL_CUDA_SM90_KEEP_CUH_
#define FLASHPREFILL_CUDA_SM90_KEEP_CUH_

#include "cuda/common/ptx.cuh"
#include "cuda/sm90/keep.h"

namespace flashprefill::cuda {

__device__ inline float WarpSum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

__device__ inline float WarpMax(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}

// An integer that orders as the float does; both zeros are one.
__device__ inline uint32_t OrderOf(float x) {
  const uint32_t u = __float_as_uint(x + 0.f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

__device__ inline float OfOrder(uint32_t order) {
  return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

// The set of largest values: all whose order is at least `above`, and of those from `from` up to it the first `ties`.
struct Cut {
  uint32_t from, above;
  int ties;
};

// The smallest set of largest values that reaches a target: `target` of them, or by mass that share of their sum. With
// a gain: those v, from the largest down, for which v sqrt(rest) reaches it, both as shares of the sum, where rest is
// what v and the smaller ones sum to. The interval in which the set's smallest member lies is cut in four at each pass
// over the values, first where masses lie.
__device__ inline Cut FindCut(const float* values, int count, float largest, bool by_mass, float target,
                              float gain = 0) {
  const int lane = threadIdx.x % 32;
  float sum[3];
  int number[3];
  // Of the values from each of three limits on: how many, and their sum, or their number again.
  auto add_up = [&](const uint32_t(&limit)[3]) {
    const float from[3] = {OfOrder(limit[0]), OfOrder(limit[1]), OfOrder(limit[2])};
#pragma unroll
    for (int k = 0; k < 3; ++k) sum[k] = 0, number[k] = 0;
#pragma unroll 4
    for (int b = lane; b < count; b += 32) {
      const float value = values[b];
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        if (value >= from[k]) {
          sum[k] += value;
          ++number[k];
        }
      }
    }
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      number[k] = __reduce_add_sync(~0u, number[k]);
      sum[k] = by_mass ? WarpSum(sum[k]) : static_cast<float>(number[k]);
    }
  };

  // Those from low up reach the target, those from high up do not.
  uint32_t low = OrderOf(-INFINITY), high = OrderOf(largest) + 1;
  int low_count = count, high_count = 0;
  float high_sum = 0;
  if (by_mass) {
    add_up({low, low, low});
    if (sum[0] == 0) return {0, ~0u, gain > 0 ? 0 : 1}; // nothing has mass: the first is the crossing one
    target *= sum[0];
  }
  const float total = by_mass ? sum[0] : 0.f, least = gain * total * sqrtf(total);
  auto gains = [&](float value, float above) { return value * sqrtf(fmaxf(total - above, 0.f)) >= least; };
  if (gain > 0 && !gains(largest, 0)) return {~0u, ~0u, 0};
  // Whether those from a limit on are the whole set.
  auto reached = [&](uint32_t from, float their_sum) {
    return gain > 0 ? !gains(OfOrder(from - 1), their_sum) : their_sum >= target;
  };
#pragma unroll 1
  for (bool first = by_mass; high - low > 1 && low_count - high_count > 1; first = false) {
    const uint32_t last = high - 1, quarter = max(1u, (high - low) / 4); // limits lie above low and below high
    uint32_t limit[3] = {low + quarter, min(low + 2 * quarter, last), min(low + 3 * quarter, last)};
    if (first) {
      limit[0] = OrderOf(largest * 0x1p-16f);
      limit[1] = OrderOf(largest * 0x1p-9f);
      limit[2] = OrderOf(largest * 0x1p-4f);
    }
    add_up(limit);
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      if (reached(limit[k], sum[k])) {
        low = limit[k];
        low_count = number[k];
      } else {
        high = limit[k];
        high_count = number[k];
        high_sum = sum[k];
        break;
      }
    }
  }
  Cut cut{low, high, 1};
  if (gain > 0) { // of the values between the limits, which are equal, those that gain enough one after another
    float value = -INFINITY;
    for (int b = lane; b < count; b += 32) value = OrderOf(values[b]) < high ? fmaxf(value, values[b]) : value;
    value = WarpMax(value);
    const float share = least / value;
    const float number_of = floorf((total - high_sum - share * share) / value) + 1;
    cut.ties =
        value > 0 ? static_cast<int>(fminf(fmaxf(number_of, 0.f), static_cast<float>(low_count - high_count))) : 0;
  } else if (low_count - high_count > 1) { // equal values: as many as it takes, by index
    const float wanted = ceilf((target - high_sum) / (by_mass ? OfOrder(low) : 1.f));
    const int most = low_count - high_count;
    cut.ties = wanted >= 1.f ? (wanted < static_cast<float>(most) ? static_cast<int>(wanted) : most) : 1;
  }
  return cut;
}

// The lowest `count` of the set bits.
__device__ inline uint32_t LowestBits(uint32_t bits, int count) {
  uint32_t out = 0;
  for (; count > 0 && bits; --count) {
    out |= bits & (0u - bits);
    bits &= bits - 1;
  }
  return out;
}

// Which of 32 values are in the cut's set; called for ascending groups of values; `ties` counts down.
__device__ inline uint32_t InCut(Cut& cut, bool valid, float value) {
  const uint32_t order = OrderOf(value);
  uint32_t bits = __ballot_sync(~0u, valid && order >= cut.above);
  const uint32_t equal = __ballot_sync(~0u, valid && order >= cut.from && order < cut.above);
  if (equal && cut.ties > 0) {
    const uint32_t taken = LowestBits(equal, cut.ties);
    cut.ties -= __popc(taken);
    bits |= taken;
  }
  return bits;
}

// Bits of blocks [begin, end) in the 32 from `first` on.
__device__ inline uint32_t RangeBits(int begin, int end, int first) {
  const int low = max(begin - first, 0), high = min(end - first, 32);
  if (low >= high) return 0;
  return (high == 32 ? ~0u : (1u << high) - 1) & (~0u << low);
}

// What a tile's row of the mask is made of, beside its energies.
struct MaskRow {
  int scored;       // blocks that have an energy; 0 if nothing is chosen by score
  int visible;      // blocks that may be kept
  int sink;         // blocks [0, sink) are kept
  int window_begin; // and blocks [window_begin, visible)
};

// Writes a row of `half_words` 32-bit words and returns the number of bits set. energies: base-2 logarithms, which a
// rule by mass overwrites. 1, 2 or 4 (1 << log2_parts) warps share a row, and each returns its part of the number;
// where an earlier block's fate decides a later one's, the first warp does it alone.
__device__ inline int WriteMaskRow(const KeepRule& rule, const MaskRow& row, float* energies, uint32_t* bits,
                                   int half_words, int part, int log2_parts) {
  const bool by_gain = rule.gain > 0, to_mass = by_gain || (rule.by_mass && rule.mass < 1.f);
  if (to_mass || rule.min_blocks > 0) {
    if (part > 0) return 0;
    log2_parts = 0;
  }
  const int lane = threadIdx.x % 32;
  const int scored = row.scored;
  float largest = -INFINITY;
  for (int first = 0; first < scored; first += 256) { // eight loads at a time; past the end, the last one again
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, energies[min(first + 32 * i + lane, scored - 1)]);
  }
  largest = WarpMax(largest);

  const float least =
      rule.by_mass || by_gain ? -INFINITY : largest + rule.alpha_log2; // by alpha: everything from here on
  if (to_mass) {
    // A tile whose scores are all -inf has no mass: then its first block is the crossing one.
    const float base = largest == -INFINITY ? 0.f : largest;
#pragma unroll 8
    for (int b = lane; b < scored; b += 32) energies[b] = Exp2(energies[b] - base);
    largest = largest == -INFINITY ? 0.f : 1.f;
  }
  Cut cuts[2] = {}; // by mass, by number
#pragma unroll 1
  for (int which = 0; which < 2 && scored > 0; ++which) {
    if (which == 0 ? to_mass : rule.min_blocks > 0) {
      const float least_number = static_cast<float>(min(rule.min_blocks, scored));
      cuts[which] = FindCut(energies, scored, largest, which == 0, which == 0 ? rule.mass : least_number,
                            which == 0 ? rule.gain : 0.f);
    }
  }

  // Lane l puts together half-word group + l: the warp finds out by votes which of its 32 blocks are chosen, forced
  // blocks are ranges that each lane knows.
  const int span = 32 >> log2_parts, begin = part * span;
  int kept = 0;
  for (int group = 0; group < half_words; group += 32) {
    uint32_t mine = 0;
    if (!to_mass && rule.min_blocks == 0) {
      // Votes past the scored blocks repeat the last one's: those blocks are forced (the diagonal) or not visible.
      for (int j = begin; j < begin + span && 32 * (group + j) < scored; j += 8) { // span is a multiple of 8
        float energy[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) energy[i] = energies[min(32 * (group + j + i) + lane, scored - 1)];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const uint32_t chosen = __ballot_sync(~0u, energy[i] >= least);
          if (j + i == lane) mine = chosen;
        }
      }
    } else {
      for (int j = 0; j < 32 && 32 * (group + j) < scored; ++j) {
        const int block = 32 * (group + j) + lane;
        const bool valid = block < scored;
        const float energy = valid ? energies[block] : -INFINITY;
        uint32_t chosen = to_mass ? InCut(cuts[0], valid, energy) : __ballot_sync(~0u, valid && energy >= least);
        if (rule.min_blocks > 0) chosen |= InCut(cuts[1], valid, energy);
        if (j == lane) mine = chosen;
      }
    }
    const int first = 32 * (group + lane);
    mine |= RangeBits(0, row.sink, first) | RangeBits(row.window_begin, row.visible, first);
    mine &= RangeBits(0, row.visible, first);
    if (lane >= begin && lane < begin + span && group + lane < half_words) {
      bits[group + lane] = mine;
      kept += __popc(mine);
    }
  }
  return __reduce_add_sync(~0u, kept);
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_KEEP_CUH_
