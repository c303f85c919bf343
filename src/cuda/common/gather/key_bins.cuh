// Keys counted by bins of their codes, and the threshold that a policy's rule finds in them. Nothing is sorted.
//
// A bin is a quarter octave of energies, the upper 8 bits of a code. By gain, bins are in for sure, then one is not:
// both factors of a key's gain, its energy and what is left from it on, fall with its rank. That bin's keys are counted
// by code, and one warp finds the code at which the gain ends and how many of its keys are still in; if the whole bin
// is in after all, the next lower one has its turn. By budget, and where a list has too little room, the count decides
// in the same way. Sums of counts are of integers, those of energies have one order: equal bits every time.
#ifndef FLASHPREFILL_CUDA_COMMON_GATHER_KEY_BINS_CUH_
#define FLASHPREFILL_CUDA_COMMON_GATHER_KEY_BINS_CUH_

#include "cuda/common/gather/args.h"

namespace flashprefill::cuda {

constexpr int kChooseThreads = 256, kChooseWarps = kChooseThreads / 32;
constexpr int kBins = 256, kFine = 256; // codes are 256 bin + fine

struct Threshold {
  int code;  // keys with more are in, and of those with this
  int equal; // the first so many
  int kept;  // of all
};

struct ChooseShared {
  uint32_t count[kBins], excess[kBins]; // keys; what they hold beyond the bin's lower end
  uint32_t fine[kFine];
  float below[kBins];             // energies of the bins below each
  uint32_t scan[2][kChooseWarps]; // of a step and the next
  float others[kChooseWarps];
  Threshold threshold;
  int bin; // that is looked at; -1: done
  int candidates;
};

// The energy of bin 2 i + `odd`'s code `fine` beyond that of its first one, in 1/1024 of this: to 0.57. Energies are
// roots, so that with x = fine / 512.5, where the fraction begins at 1, or fine / 768.5, where it does at 1.5, it is
// 1024 (sqrt(1 + x) - 1).
__device__ inline uint32_t ExcessOf(uint32_t fine, bool odd) {
  const uint32_t linear = odd ? 2808682 : 4180869, square = odd ? 1085 : 1874;
  return (fine * (linear - fine * (square - fine)) + (1u << 21)) >> 22;
}

// The sum of a warp's numbers up to this lane's.
__device__ inline uint32_t SumUpToLane(uint32_t sum, int lane) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const uint32_t lower = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += lower;
  }
  return sum;
}

class KeyBins {
 public:
  __device__ KeyBins(const KeyChoiceArgs& args, ChooseShared& shared)
      : args_(args),
        sm_(shared),
        inverse_heads_(1.f / static_cast<float>(args.shape.heads)),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32) {}

  __device__ void Clear() const {
    for (int i = threadIdx.x; i < kBins; i += kChooseThreads) sm_.count[i] = sm_.excess[i] = 0;
  }

  // The threshold at which the gain ends, of keys that are counted in the bins; `others` is what keys hold that are
  // not. False if it does not end. count_fine counts a bin's keys by code. All threads.
  template <typename CountFine>
  __device__ bool EndGain(float others, CountFine&& count_fine) const {
    // The highest bin with keys of which the last is perhaps not worth it.
    if (warp_ == 0) {
      const int bin = LastOfGain(1, others);
      if (lane_ == 0) sm_.bin = bin;
    }
    __syncthreads();
    while (true) {
      const int bin = sm_.bin;
      if (bin < 0) return false;
      count_fine(bin);
      if (warp_ == 0) EndGainIn(bin);
      __syncthreads();
      if (sm_.bin == bin) return true;
    }
  }

  // The threshold of the best `count`, of at least as many that are counted. All threads; others may still read it.
  template <typename CountFine>
  __device__ void EndCount(int count, CountFine&& count_fine) const {
    int above = 0;
    const int bin = Reaches(sm_.count, count, above); // in which the count is reached, and in it the code
    count_fine(bin);
    const int fine = Reaches(sm_.fine, count, above);
    __syncthreads();
    if (threadIdx.x == 0) sm_.threshold = {bin * kFine + fine, count - above, count};
    __syncthreads();
  }

  // The highest bin with keys of which the last is perhaps not worth it, or -1, where each key that is counted counts
  // as `weight`. Of all bins but that, sm_.below is right after it. One warp.
  __device__ int LastOfGain(float weight, float others) const {
    float x[8], below[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = weight * EnergyOfBin(lane_ * 8 + i);
    SumBelow(x, below);
#pragma unroll
    for (int i = 0; i < 8; ++i) sm_.below[lane_ * 8 + i] = below[i] += others;
    return HighestOf([&](int i) {
      const float lower = LowerEnd(lane_ * 8 + i);
      return sm_.count[lane_ * 8 + i] > 0 && !Worth(lower, below[i] + lower);
    });
  }

  // The highest bin whose first code's energy is below this, or -1. One warp.
  __device__ int HighestBelow(float energy) const {
    return HighestOf([&](int i) { return LowerEnd(lane_ * 8 + i) < energy; });
  }

  // From the highest number down, the one at which `count` is reached, or -1; `above` grows by those above it. A warp:
  // every warp finds it for itself.
  __device__ int Reaches(const uint32_t (&counts)[256], int count, int& above) const {
    int own[8], sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += own[i] = static_cast<int>(counts[lane_ * 8 + i]);
    int upward = sum; // of this lane and those above it
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int higher = __shfl_down_sync(~0u, upward, d);
      if (lane_ + d < 32) upward += higher;
    }
    int at = -1, before = 0, running = above + upward - sum;
#pragma unroll
    for (int i = 7; i >= 0; --i) {
      if (at < 0 && running < count && running + own[i] >= count) {
        at = lane_ * 8 + i;
        before = running;
      }
      running += own[i];
    }
    const uint32_t hits = __ballot_sync(~0u, at >= 0); // one lane has it
    if (hits == 0) return -1;
    above = __shfl_sync(~0u, before, __ffs(hits) - 1);
    return __shfl_sync(~0u, at, __ffs(hits) - 1);
  }

  __device__ float LowerEnd(int bin) const { return Energy(bin * kFine); }

 private:
  __device__ float Energy(int code) const { return EnergyOf(code, inverse_heads_); }
  __device__ float EnergyOfBin(int bin) const {
    return LowerEnd(bin) * fmaf(static_cast<float>(sm_.excess[bin]), 1.f / 1024, static_cast<float>(sm_.count[bin]));
  }
  __device__ bool Worth(float energy, float rest) const { return energy * sqrtf(fmaxf(rest, 0)) >= args_.gain; }

  // Of a warp's 8 numbers per lane, in ascending order: each one's sum with those below it, itself left out.
  __device__ void SumBelow(const float (&x)[8], float (&below)[8]) const {
    float own = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) own += x[i];
    float sum = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const float lower = __shfl_up_sync(~0u, sum, d);
      if (lane_ >= d) sum += lower;
    }
    sum = __shfl_up_sync(~0u, sum, 1);
    if (lane_ == 0) sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      below[i] = sum;
      sum += x[i];
    }
  }

  // The highest of 256 numbers, 8 per lane, for which `fails` says so, or -1.
  template <typename Fails>
  __device__ int HighestOf(Fails&& fails) const {
    int highest = -1;
#pragma unroll
    for (int i = 0; i < 8; ++i) highest = fails(i) ? lane_ * 8 + i : highest;
    return __reduce_max_sync(~0u, highest);
  }

  // Where in the bin the gain ends; if it doesn't, the next bin is to be looked at. One warp.
  __device__ void EndGainIn(int bin) const {
    float x[8], below[8], energy[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int fine = lane_ * 8 + i;
      energy[i] = Energy(bin * kFine + fine);
      x[i] = energy[i] * static_cast<float>(sm_.fine[fine]);
    }
    SumBelow(x, below);
    const int fine = HighestOf([&](int i) {
      const float rest = sm_.below[bin] + below[i] + energy[i]; // from the code's last key on
      return sm_.fine[lane_ * 8 + i] > 0 && !Worth(energy[i], rest);
    });
    if (fine < 0) {
      const int next = HighestOf([&](int i) { return lane_ * 8 + i < bin && sm_.count[lane_ * 8 + i] > 0; });
      if (lane_ == 0) sm_.bin = next;
      return;
    }
    int above = 0; // keys of the bins and codes above
    for (int i = lane_; i < kBins; i += 32) {
      if (i > bin) above += sm_.count[i];
      if (i > fine) above += sm_.fine[i];
    }
    above = __reduce_add_sync(~0u, above);
    float left = 0; // from the code's first key on
#pragma unroll
    for (int i = 0; i < 8; ++i) left = lane_ * 8 + i == fine ? sm_.below[bin] + below[i] + x[i] : left;
    if (lane_ != fine / 8) return;
    // Key n of the code has n fewer than all of them left: it is in as long as that is enough.
    const float each = Energy(bin * kFine + fine), enough = args_.gain / each;
    const float in = floorf((left - enough * enough) / each) + 1;
    const int equal = static_cast<int>(fminf(fmaxf(in, 0), static_cast<float>(sm_.fine[fine])));
    sm_.threshold = {bin * kFine + fine, equal, above + equal};
  }

  const KeyChoiceArgs& args_;
  ChooseShared& sm_;
  const float inverse_heads_;
  const int warp_, lane_;
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_GATHER_KEY_BINS_CUH_
