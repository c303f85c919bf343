// The largest of a set of values, by number or by their sum, without a sort: a radix select over the bits of
// floats that are not negative and below 2, which order as they do. Three passes over the values take ten bits each. A
// pass puts each value that has the digits found so far into one of 1024 bins, which count them and add up their lower
// bits: integers, so that it doesn't matter which thread comes first, and a bin's mass follows exactly. Then the bins
// are gone through from the largest on, up to the one that would pass the limit: the next digit.
//
// In falling order, the values above `prefix` are in, and the first `equal` of those that equal it. Bins may lie in
// shared memory, for one CTA, or be added up in device memory for many.
#ifndef FLASHPREFILL_CUDA_COMMON_RADIX_THRESHOLD_CUH_
#define FLASHPREFILL_CUDA_COMMON_RADIX_THRESHOLD_CUH_

#include <cstdint>

namespace flashprefill::cuda {

constexpr int kRadixBins = 1024;
constexpr int kRadixLevels = 3;

#ifdef __CUDACC__

struct RadixBins {
  uint32_t count[kRadixBins];
  uint32_t low[kRadixBins], high[kRadixBins]; // sums of the ten bits below the digit's, or of ten and ten
};

__device__ inline uint32_t RadixOrder(float x) { return min(__float_as_uint(x), 0x3fffffffu); }

__device__ inline void AddToBins(RadixBins& bins, int level, uint32_t prefix, uint32_t order) {
  if (level > 0 && order >> (30 - 10 * level) != prefix) return;
  const uint32_t digit = order >> (20 - 10 * level) & 1023;
  atomicAdd(&bins.count[digit], 1);
  if (level < 2) atomicAdd(&bins.low[digit], order & 1023);
  if (level < 1) atomicAdd(&bins.high[digit], order >> 10 & 1023);
}

// The sum of a bin's values. rest: of the bits below the digit's.
__device__ inline double MassOfBin(int level, uint32_t prefix, uint32_t digit, uint32_t count, uint64_t rest) {
  const uint32_t order = (prefix << 10 | digit) << (20 - 10 * level);
  const int exponent = max(1u, order >> 23); // of the last bit: 2^(exponent - 150)
  const double bit = __hiloint2double((exponent - 150 + 1023) << 20, 0);
  return static_cast<double>(count) * __uint_as_float(order) + static_cast<double>(rest) * bit;
}

struct RadixThreshold {
  double sum;     // of the values above the digits found so far
  uint32_t above; // how many
  uint32_t prefix;
  bool passes; // else all values are in

  __device__ static RadixThreshold Start() { return {0, 0, 0, true}; }
  // Of the values that equal prefix, after the last level.
  __device__ uint32_t Equal(double limit, bool by_number) const {
    const double each = by_number ? 1 : __uint_as_float(prefix);
    const double fit = each > 0 ? floor((limit - sum) / each) : 0;
    return fit > 0 ? static_cast<uint32_t>(fit) : 0;
  }
};

template <int THREADS>
struct RadixScan {
  double sum[THREADS / 32];
  uint32_t number[THREADS / 32];
  int first;
};

// Finds the digit of one level. All threads of the CTA; `threshold`, in shared memory, is
// the state before and after.
// bin(digit, count, mass) reads a bin. Ends with a barrier passed.
template <int THREADS, typename Bin>
__device__ inline void Descend(RadixThreshold& threshold, int level, double limit, RadixScan<THREADS>& scan,
                               Bin&& bin) {
  constexpr int kEach = kRadixBins / THREADS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, begin = threadIdx.x * kEach; // from the largest on
  uint32_t count[kEach], counts = 0;
  double mass[kEach], masses = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    bin(kRadixBins - 1 - (begin + i), count[i], mass[i]);
    counts += count[i];
    masses += mass[i];
  }
  if (threadIdx.x == 0) scan.first = kRadixBins;
  uint32_t before = counts;
  double mass_before = masses;
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, before, offset);
    const double other_mass = __shfl_up_sync(~0u, mass_before, offset);
    if (lane >= offset) before += other, mass_before += other_mass;
  }
  if (lane == 31) scan.number[warp] = before, scan.sum[warp] = mass_before;
  before = __shfl_up_sync(~0u, before, 1);
  mass_before = __shfl_up_sync(~0u, mass_before, 1);
  if (lane == 0) before = 0, mass_before = 0;
  __syncthreads();
  for (int w = 0; w < warp; ++w) before += scan.number[w], mass_before += scan.sum[w];
  before += threshold.above;
  mass_before += threshold.sum;

  double sum = mass_before;
  int passing = kRadixBins;
  double up_to = mass_before;
#pragma unroll
  for (int i = 0; i < kEach; ++i) { // the first bin that passes the limit
    up_to += mass[i];
    if (up_to > limit && passing == kRadixBins) passing = begin + i;
  }
  // Below the first level some bin passes for sure; should rounding say otherwise it is the last bin.
  if (level > 0 && threadIdx.x == THREADS - 1 && passing == kRadixBins) passing = kRadixBins - 1;
  if (passing < kRadixBins) atomicMin(&scan.first, passing);
  __syncthreads();
  if (scan.first == kRadixBins) {
    if (threadIdx.x == 0) threshold.passes = false;
  } else if (scan.first == passing) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (begin + i < passing) before += count[i], sum += mass[i];
    }
    threshold.above = before;
    threshold.sum = sum;
    threshold.prefix = threshold.prefix << 10 | static_cast<uint32_t>(kRadixBins - 1 - passing);
  }
  __syncthreads();
}

#endif // __CUDACC__

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_RADIX_THRESHOLD_CUH_
