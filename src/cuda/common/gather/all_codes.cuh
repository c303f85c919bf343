// A list's keys from all its codes, by three sweeps over them: counts by bin, counts of the threshold's bin by code,
// the list. The way of lists whose candidates (candidates.cuh) have no room, or do not tell.
//
// A warp counts in bins of its own: a word has 12 bits of count and 20 of what keys hold beyond the bin's lower end, in
// 1/1024 of it, so that one atomic addition does both. It is emptied into the CTA's bins before the count is full. The
// arithmetic is of integers, since conversions and roots are done by a unit that is four times as slow. A sweep takes
// 20 to 30 instructions of a warp for 32 codes: those decide how fast it is, not the loads.
#ifndef FLASHPREFILL_CUDA_COMMON_GATHER_ALL_CODES_CUH_
#define FLASHPREFILL_CUDA_COMMON_GATHER_ALL_CODES_CUH_

#include "cuda/common/gather/key_bins.cuh"

namespace flashprefill::cuda {

constexpr int kCodesEach = 8; // of a thread: 16 bytes

class AllCodes {
 public:
  static constexpr int kBytes = kChooseWarps * kBins * 4; // of `memory`

  __device__ AllCodes(const DeviceSegment& segment, const uint16_t* codes, ChooseShared& shared, uint32_t* memory)
      : segment_(segment),
        codes_(codes),
        sm_(shared),
        warp_bins_(memory),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32) {}

  // The caller has cleared the CTA's bins.
  __device__ void CountBins() {
    for (int i = threadIdx.x; i < kChooseWarps * kBins; i += kChooseThreads) warp_bins_[i] = 0;
    __syncthreads();
    uint32_t* const bins = warp_bins_ + warp_ * kBins;
    int steps = 0;
    const auto empty = [&] {
      __syncwarp();
      for (int i = lane_; i < kBins; i += 32) {
        const uint32_t word = bins[i];
        if (word == 0) continue;
        atomicAdd(&sm_.count[i], word >> kCountShift);
        atomicAdd(&sm_.excess[i], word & ((1u << kCountShift) - 1));
        bins[i] = 0;
      }
      __syncwarp();
    };
    ForCodes([&](int, const int(&code)[kCodesEach]) {
#pragma unroll
      for (int i = 0; i < kCodesEach; ++i) {
        if (code[i] < 0) continue;
        const uint32_t fine = code[i] % kFine, bin = code[i] / kFine;
        atomicAdd(&bins[bin], (1u << kCountShift) + ExcessOf(fine, bin % 2));
      }
      if (++steps == kFullSteps) {
        empty();
        steps = 0;
      }
    });
    empty();
    __syncthreads();
  }

  __device__ void CountFine(int bin) {
    for (int i = threadIdx.x; i < kFine; i += kChooseThreads) sm_.fine[i] = 0;
    __syncthreads();
    ForCodes([&](int, const int(&code)[kCodesEach]) {
#pragma unroll
      for (int i = 0; i < kCodesEach; ++i) {
        if (code[i] >= 0 && code[i] / kFine == bin) atomicAdd(&sm_.fine[code[i] % kFine], 1u);
      }
    });
    __syncthreads();
  }

  __device__ void Write(int32_t* keys) {
    const Threshold threshold = sm_.threshold;
    int above = 0, equal = 0, turn = 0; // before this step
    ForCodes([&](int key, const int(&code)[kCodesEach]) {
      uint32_t in = 0, tie = 0;
#pragma unroll
      for (int i = 0; i < kCodesEach; ++i) {
        in |= static_cast<uint32_t>(code[i] > threshold.code) << i;
        tie |= static_cast<uint32_t>(code[i] == threshold.code) << i;
      }
      if (threshold.code < 0) { // all that are ranked
        in = 0;
        tie = 0;
#pragma unroll
        for (int i = 0; i < kCodesEach; ++i) in |= static_cast<uint32_t>(code[i] >= 0) << i;
      }
      // Both numbers in one word: a step has 2,048 keys.
      const uint32_t own = __popc(in) | __popc(tie) << 16, sum = SumUpToLane(own, lane_);
      turn ^= 1; // the other sums may still be read
      if (lane_ == 31) sm_.scan[turn][warp_] = sum;
      __syncthreads();
      uint32_t before = sum - own, all = 0;
#pragma unroll
      for (int w = 0; w < kChooseWarps; ++w) {
        const uint32_t its = sm_.scan[turn][w];
        before += w < warp_ ? its : 0;
        all += its;
      }
      int ties = equal + static_cast<int>(before >> 16); // before the next key
      int32_t* to = keys + above + (before & 0xffff) + min(ties, threshold.equal);
      if (own != 0) {
#pragma unroll
        for (int i = 0; i < kCodesEach; ++i) {
          const bool is_tie = tie >> i & 1;
          if ((in >> i & 1) || (is_tie && ties < threshold.equal)) *to++ = key + i;
          ties += is_tie;
        }
      }
      above += static_cast<int>(all & 0xffff);
      equal += static_cast<int>(all >> 16);
    });
  }

 private:
  static constexpr int kAtOnce = kChooseThreads * kCodesEach; // keys of a sweep's step
  static constexpr int kAhead = 3;                            // steps
  static constexpr int kCountShift = 20;                      // of a warp's bins
  static constexpr int kFullSteps = 4095 / (32 * kCodesEach); // until a count may be full; 230 of excess each fit

  // Calls body(first key, codes) for all threads of the CTA; codes of keys that are not ranked come as -1. Some steps
  // are asked for ahead.
  template <typename Body>
  __device__ void ForCodes(Body&& body) const {
    const int begin = segment_.first_key / kCodesEach * kCodesEach + static_cast<int>(threadIdx.x) * kCodesEach;
    const int steps = (segment_.end_key - segment_.first_key / kCodesEach * kCodesEach + kAtOnce - 1) / kAtOnce;
    const auto load = [&](int step) {
      const int key = begin + step * kAtOnce;
      return key < segment_.end_key ? __ldcg(reinterpret_cast<const uint4*>(codes_ + key)) : uint4{0, 0, 0, 0};
    };
    uint4 ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = load(i);
#pragma unroll 1
    for (int first = 0; first < steps; first += kAhead) {
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        if (first + n >= steps) break;
        const int key = begin + (first + n) * kAtOnce;
        const uint32_t word[4] = {ahead[n].x, ahead[n].y, ahead[n].z, ahead[n].w};
        ahead[n] = load(first + n + kAhead);
        int code[kCodesEach];
#pragma unroll
        for (int i = 0; i < kCodesEach; ++i) {
          const bool ranked = key + i >= segment_.first_key && key + i < segment_.end_key;
          code[i] = ranked ? static_cast<int>(word[i / 2] >> (i % 2 * 16) & 0xffff) : -1;
        }
        body(key, code);
      }
    }
  }

  const DeviceSegment& segment_;
  const uint16_t* const codes_;
  ChooseShared& sm_;
  uint32_t* const warp_bins_;
  const int warp_, lane_;
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_GATHER_ALL_CODES_CUH_
