// From energies to bits, by one warp for one tile: the threshold of alpha, the smallest set of a given mass, the blocks
// of at least a given gain, the top few, joined with the forced ones. The energies of the tile lie in shared memory, so
// a pass over 1024 blocks is 32 loads per lane. threshold.cuh finds the largest ones that reach a target.
#ifndef FLASHPREFILL_CUDA_COMMON_ENERGIES_KEEP_CUH_
#define FLASHPREFILL_CUDA_COMMON_ENERGIES_KEEP_CUH_

#include "cuda/common/energies/keep.h"
#include "cuda/common/energies/threshold.cuh"

namespace flashprefill::cuda {

// Bits of blocks [begin, end) in the 32 from `first` on.
__device__ inline uint32_t RangeBits(int begin, int end, int first) {
  const int low = max(begin - first, 0), high = min(end - first, 32);
  if (low >= high) return 0;
  return (high == 32 ? ~0u : (1u << high) - 1) & (~0u << low);
}

// A tile's row of the mask, apart from its energies.
struct MaskRow {
  int scored;       // blocks that have an energy; 0 if nothing is chosen by score
  int visible;      // blocks that may be kept
  int sink;         // blocks [0, sink) are kept
  int window_begin; // and blocks [window_begin, visible)
};

// Up to this share of the mass FindMassThreshold's units are fine enough: 4096 blocks lose a thousandth of the largest
// mass.
constexpr float kBinnedMass = 0.99f;

// The largest energy of a row, and with SMALLEST this lane's smallest.
template <bool SMALLEST, typename Energy>
__device__ __forceinline__ float LargestEnergy(Energy&& energy_of, int scored, float& smallest) {
  float largest = -INFINITY;
  for (int first = 0; first < scored; first += 256) { // eight loads at a time; past the end, the last one again
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float energy = energy_of(min(first + 32 * i + static_cast<int>(threadIdx.x % 32), scored - 1));
      largest = fmaxf(largest, energy);
      if (SMALLEST) smallest = fminf(smallest, energy);
    }
  }
  return WarpMax(largest);
}

// In lane l, which blocks of half-word group + l have an energy of at least `least`, for lanes [begin, begin + span).
// Votes past the scored blocks repeat the last one's: those blocks are forced (the diagonal) or not visible.
template <typename Energy>
__device__ __forceinline__ uint32_t VotesFrom(Energy&& energy_of, int scored, int group, int begin, int span,
                                              float least) {
  const int lane = threadIdx.x % 32;
  uint32_t mine = 0;
  for (int j = begin; j < begin + span && 32 * (group + j) < scored; j += 8) { // span is a multiple of 8
    float energy[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) energy[i] = energy_of(min(32 * (group + j + i) + lane, scored - 1));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t chosen = __ballot_sync(~0u, energy[i] >= least);
      if (j + i == lane) mine = chosen;
    }
  }
  return mine;
}

// Writes a row of `half_words` 32-bit words and returns the number of bits set. energies: base-2 logarithms in shared
// memory, floats, which a rule by gain or without bins overwrites, or __half where there is no room for them. `bins`:
// kThresholdBins words of this warp there, or null. 1, 2 or 4 (1 << log2_parts) warps share a row, and each returns its
// part of the number; where an earlier block's fate decides a later one's, the first warp does it alone. TO_MASS: the
// rule may be by mass or gain.
template <bool TO_MASS, typename Stored>
__device__ inline int WriteMaskRow(const KeepRule& rule, const MaskRow& row, Stored* energies, uint32_t* bits,
                                   int half_words, int part, int log2_parts, uint32_t* bins = nullptr) {
  const bool by_gain = TO_MASS && rule.gain > 0, to_mass = TO_MASS && (by_gain || (rule.by_mass && rule.mass < 1.f));
  if (to_mass || rule.min_blocks > 0) {
    if (part > 0) return 0;
    log2_parts = 0;
  }
  const int lane = threadIdx.x % 32;
  const int scored = row.scored;
  auto energy_of = [&](int b) { return static_cast<float>(energies[b]); };
  // Find the largest energy.
  float smallest = INFINITY;
  float largest = LargestEnergy<TO_MASS>(energy_of, scored, smallest);

  // Find the thresholds.
  const float least =
      TO_MASS && (rule.by_mass || by_gain) ? -INFINITY : largest + rule.alpha_log2; // by alpha: everything from here on
  constexpr bool kOverwrites = sizeof(Stored) == sizeof(float);
  Threshold thresholds[2] = {}; // by mass, by number
  // Energies are compared, or masses.
  bool masses = to_mass && scored > 0;
  if (masses && bins && !by_gain && rule.mass <= kBinnedMass && largest > -INFINITY) {
    masses = !FindMassThreshold(energy_of, scored, -WarpMax(-smallest), largest, rule.mass, bins, thresholds[0]);
  }
  // A tile whose scores are all -inf has no mass: then its first block is the threshold.
  const float base = largest == -INFINITY ? 0.f : largest;
  if (masses) {
    if constexpr (kOverwrites) { // other lanes read the last energy before and after
      __syncwarp();
#pragma unroll 8
      for (int b = lane; b < scored; b += 32) energies[b] = Exp2(energies[b] - base);
      __syncwarp();
    }
    largest = largest == -INFINITY ? 0.f : 1.f;
  }
  auto value_of = [&](int b) { return masses && !kOverwrites ? Exp2(energy_of(b) - base) : energy_of(b); };
#pragma unroll 1
  for (int which = 0; which < 2 && scored > 0; ++which) {
    if (which == 0 ? masses : rule.min_blocks > 0) {
      const float least_number = static_cast<float>(min(rule.min_blocks, scored));
      thresholds[which] = FindThreshold(value_of, scored, largest, which == 0, which == 0 ? rule.mass : least_number,
                                        which == 0 ? rule.gain : 0.f);
    }
  }

  // Write the bits. Lane l puts together half-word group + l: the warp finds out by votes which of its 32 blocks are
  // chosen, forced blocks are ranges that each lane knows.
  const int span = 32 >> log2_parts, begin = part * span;
  int kept = 0;
  for (int group = 0; group < half_words; group += 32) {
    uint32_t mine = 0;
    if (!to_mass && rule.min_blocks == 0) {
      mine = VotesFrom(energy_of, scored, group, begin, span, least);
    } else {
      for (int j = 0; j < 32 && 32 * (group + j) < scored; j += 4) {
        float value[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) value[i] = value_of(min(32 * (group + j + i) + lane, scored - 1));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool valid = 32 * (group + j + i) + lane < scored;
          uint32_t chosen =
              to_mass ? Reaches(thresholds[0], valid, value[i]) : __ballot_sync(~0u, valid && value[i] >= least);
          if (rule.min_blocks > 0) chosen |= Reaches(thresholds[1], valid, value[i]);
          if (j + i == lane) mine = chosen;
        }
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

#endif // FLASHPREFILL_CUDA_COMMON_ENERGIES_KEEP_CUH_
