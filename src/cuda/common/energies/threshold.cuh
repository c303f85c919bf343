// Which values are the largest that reach a target, by one warp, without a sort. Sums are taken in an order that
// depends on the number of values alone, or in integers, so the same input gives the same bits.
#ifndef FLASHPREFILL_CUDA_COMMON_ENERGIES_THRESHOLD_CUH_
#define FLASHPREFILL_CUDA_COMMON_ENERGIES_THRESHOLD_CUH_

#include "cuda/common/numbers.cuh"
#include "cuda/common/ptx.cuh"

namespace flashprefill::cuda {

constexpr int kThresholdBins = 256; // words of shared memory that FindMassThreshold wants

// An integer that orders as the float does; both zeros are one.
__device__ inline uint32_t OrderOf(float x) {
  const uint32_t u = __float_as_uint(x + 0.f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

__device__ inline float OfOrder(uint32_t order) {
  return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

// The set of largest values: all whose order is at least `above`, and of those from `from` up to it the first `ties`.
struct Threshold {
  uint32_t from, above;
  int ties;
};

// The smallest set of largest values that reaches a target: `target` of them, or by mass that share of their sum. With
// a gain: those v, from the largest down, for which v sqrt(rest) reaches it, both as shares of the sum, where rest is
// the sum of v and the smaller ones. The interval in which the set's smallest member lies is divided in four at each
// pass over the values, first where masses lie. value_of(b) is block b's.
template <typename Value>
__device__ inline Threshold FindThreshold(Value&& value_of, int count, float largest, bool by_mass, float target,
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
      const float value = value_of(b);
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
    if (sum[0] == 0) return {0, ~0u, gain > 0 ? 0 : 1}; // nothing has mass: the first one is the threshold
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
  Threshold threshold{low, high, 1};
  if (gain > 0) { // of the values between the limits, which are equal, those that gain enough one after another
    float value = -INFINITY;
    for (int b = lane; b < count; b += 32) {
      const float x = value_of(b);
      value = OrderOf(x) < high ? fmaxf(value, x) : value;
    }
    value = WarpMax(value);
    const float share = least / value;
    const float number_of = floorf((total - high_sum - share * share) / value) + 1;
    threshold.ties =
        value > 0 ? static_cast<int>(fminf(fmaxf(number_of, 0.f), static_cast<float>(low_count - high_count))) : 0;
  } else if (low_count - high_count > 1) { // equal values: as many as it takes, by index
    const float wanted = ceilf((target - high_sum) / (by_mass ? OfOrder(low) : 1.f));
    const int most = low_count - high_count;
    threshold.ties = wanted >= 1.f ? (wanted < static_cast<float>(most) ? static_cast<int>(wanted) : most) : 1;
  }
  return threshold;
}

// Bins of masses. A block's mass is 2^energy as an integer, in units that let the masses of all blocks together fit 32
// bits, so that atomics may add them up in any order. Bin i has the energies from (origin + i / bins_per_octave) below
// the largest on. bins_per_octave is a power of two, so all of this is exact.
struct MassBins {
  float unit; // log2 of the largest mass
  float origin, bins_per_octave;
  bool first; // the last bin has everything below it too

  __device__ __forceinline__ uint32_t MassOf(float below) const { return __float2uint_rn(Exp2(unit - below)); }
  __device__ __forceinline__ float BinOf(float below) const {
    const float bin = (below - origin) * bins_per_octave; // exact, as far as the bins go
    return first ? fminf(bin, kThresholdBins - 1) : bin;
  }
};

// Adds up the masses of all blocks by bin.
template <typename Energy>
__device__ __forceinline__ void FillBins(Energy&& energy_of, int count, float largest, const MassBins& masses,
                                         uint32_t* bins) {
  const int lane = threadIdx.x % 32;
  auto* const mine = reinterpret_cast<uint4*>(bins) + 2 * lane;
  mine[0] = mine[1] = uint4{0, 0, 0, 0};
  __syncwarp();
  for (int begin = lane; begin < count + lane; begin += 128) {
    float below[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) below[i] = largest - energy_of(min(begin + 32 * i, count - 1));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float bin = masses.BinOf(below[i]);
      const bool inside = begin + 32 * i < count && bin >= 0 && bin < kThresholdBins;
      if (inside) atomicAdd(&bins[static_cast<int>(bin)], masses.MassOf(below[i]));
    }
  }
  __syncwarp();
}

// The bin in which the sum reaches the target. `before`: what larger energies sum to. The first time the target is
// set, to the share `mass` of all.
__device__ __forceinline__ int FindBin(const uint32_t* bins, bool first, float mass, uint32_t& before,
                                       uint32_t& target) {
  const int lane = threadIdx.x % 32;
  const auto* const mine = reinterpret_cast<const uint4*>(bins) + 2 * lane;
  const uint4 low = mine[0], high = mine[1];
  const uint32_t in_bin[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += in_bin[i];
  uint32_t up_to = sum;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, up_to, offset);
    up_to += lane >= offset ? other : 0;
  }
  if (first) {
    const uint32_t all = __shfl_sync(~0u, up_to, 31);
    target = min(all, max(1u, __float2uint_ru(mass * static_cast<float>(all))));
  }
  const int reaching_lane = __ffs(__ballot_sync(~0u, before + up_to >= target)) - 1;
  uint32_t sum_before = before + up_to - sum;
  int bin = 8 * lane;
#pragma unroll
  for (int i = 0; i < 7; ++i) {
    if (bin == 8 * lane + i && sum_before + in_bin[i] < target) {
      sum_before += in_bin[i];
      ++bin;
    }
  }
  before = __shfl_sync(~0u, sum_before, reaching_lane);
  return __shfl_sync(~0u, bin, reaching_lane);
}

// Writes the energies of the first 32 blocks of a bin, by index, and returns how many blocks the bin has.
template <typename Energy>
__device__ __forceinline__ int CollectBin(Energy&& energy_of, int count, float largest, const MassBins& masses, int bin,
                                          float* found) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  int number = 0;
  for (int begin = lane; begin < count + lane; begin += 128) {
    float energy[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) energy[i] = energy_of(min(begin + 32 * i, count - 1));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float below = largest - energy[i];
      const bool inside =
          begin + 32 * i < count && below >= masses.origin && static_cast<int>(masses.BinOf(below)) == bin;
      const uint32_t votes = __ballot_sync(~0u, inside);
      const int place = number + __popc(votes & ((1u << lane) - 1));
      if (inside && place < 32) found[place] = energy[i];
      number += __popc(votes);
    }
  }
  __syncwarp();
  return number;
}

// The threshold among at most 32 blocks: each lane takes one and sees for itself which blocks go before it.
__device__ __forceinline__ Threshold ThresholdOfFew(const float* found, int number, float largest,
                                                    const MassBins& masses, uint32_t before, uint32_t target) {
  const int lane = threadIdx.x % 32;
  const float energy = lane < number ? found[lane] : -INFINITY;
  const uint32_t own = lane < number ? masses.MassOf(largest - energy) : 0;
  __syncwarp();
  uint32_t sum_above = before;
  int ties = 1;
#pragma unroll 4
  for (int i = 0; i < number; ++i) {
    const float other = __shfl_sync(~0u, energy, i);
    const uint32_t its = __shfl_sync(~0u, own, i);
    const bool same = other == energy && i < lane;
    sum_above += other > energy || same ? its : 0;
    ties += same;
  }
  const bool reaches = sum_above < target && sum_above + own >= target;
  const int at = __ffs(__ballot_sync(~0u, reaches)) - 1;
  const uint32_t order = OrderOf(__shfl_sync(~0u, energy, at));
  return {order, order + 1, __shfl_sync(~0u, ties, at)};
}

// The threshold among many blocks whose energies are as good as equal: as many as it takes, by index.
template <typename Energy>
__device__ __forceinline__ Threshold ThresholdOfEqual(Energy&& energy_of, int count, int number, float largest,
                                                      const MassBins& masses, uint32_t before, uint32_t target) {
  float lowest = INFINITY, most = -INFINITY;
  for (int b = threadIdx.x % 32; b < count; b += 32) {
    const float energy = energy_of(b), from = largest - energy - masses.origin;
    if (from >= 0 && from * masses.bins_per_octave < 1) lowest = fminf(lowest, energy), most = fmaxf(most, energy);
  }
  lowest = -WarpMax(-lowest);
  most = WarpMax(most);
  const uint32_t each = max(1u, masses.MassOf(largest - most)), wanted = (target - before + each - 1) / each;
  return {OrderOf(lowest), OrderOf(most) + 1, static_cast<int>(min(wanted, static_cast<uint32_t>(number)))};
}

// The smallest set of blocks of largest energies whose masses sum to the share `mass` of all, in two or three passes.
// There are 128 to 256 bins from the largest energy to the least, or over 16 octaves. A bin of more than 32 blocks in
// which the target lies is binned again, 256 times finer. `bins` are this warp's. False if the target lies 16 octaves
// below the largest energy, where masses are too small for that.
template <typename Energy>
__device__ inline bool FindMassThreshold(Energy&& energy_of, int count, float least, float largest, float mass,
                                         uint32_t* bins, Threshold& threshold) {
  const float spread = fminf(fmaxf(largest - least, 0x1p-4f), 15.5f);
  MassBins masses{static_cast<float>(__clz(count)), 0, // count < 2^(32 - clz), and no mass is above 2^clz
                  __uint_as_float((127 + 127 + 7 - (__float_as_uint(spread) >> 23)) << 23), true};
  auto* const found = reinterpret_cast<float*>(bins);
  uint32_t before = 0, target = 0;
#pragma unroll 1
  for (int level = 0;; ++level) {
    masses.first = level == 0;
    FillBins(energy_of, count, largest, masses, bins);
    const int bin = FindBin(bins, masses.first, mass, before, target);
    if (masses.first && bin == kThresholdBins - 1) return false;
    const int number = CollectBin(energy_of, count, largest, masses, bin, found);
    if (number <= 32) {
      threshold = ThresholdOfFew(found, number, largest, masses, before, target);
      return true;
    }
    masses.origin += static_cast<float>(bin) / masses.bins_per_octave;
    if (level == 2) { // a millionth of an octave
      threshold = ThresholdOfEqual(energy_of, count, number, largest, masses, before, target);
      return true;
    }
    masses.bins_per_octave *= kThresholdBins;
    __syncwarp();
  }
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

// Which of 32 values are in the threshold's set; called for ascending groups of values; `ties` counts down.
__device__ inline uint32_t Reaches(Threshold& threshold, bool valid, float value) {
  const uint32_t order = OrderOf(value);
  uint32_t bits = __ballot_sync(~0u, valid && order >= threshold.above);
  const uint32_t equal = __ballot_sync(~0u, valid && order >= threshold.from && order < threshold.above);
  if (equal && threshold.ties > 0) {
    const uint32_t taken = LowestBits(equal, threshold.ties);
    threshold.ties -= __popc(taken);
    bits |= taken;
  }
  return bits;
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ENERGIES_THRESHOLD_CUH_
