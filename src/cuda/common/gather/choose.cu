// From codes of energies to a list of keys, a CTA for each list. Nothing is sorted.
//
// The first sweep over the codes counts keys, and what they hold, by bins of a quarter octave: the upper 8 bits of a
// code. By gain, bins are in for sure, then one is not: both factors of a key's gain, its energy and what is left from
// it on, fall with its rank. A second sweep counts that bin's keys by code, and one warp finds the code at which the
// gain ends and how many of its keys are still in; if the whole bin is in after all, the next lower one has its turn.
// By budget, and where a list has too little room, the count decides in the same way. A last sweep writes the keys
// above the threshold, and the first of those at it, in ascending order by block scans.
//
// A warp counts in bins of its own: a word has 12 bits of count and 20 of what keys hold beyond the bin's lower end, in
// 1/1024 of it, so that one atomic addition does both. It is emptied into the CTA's bins before the count is full.
// Sums are of integers: they have no order. The first sweep's arithmetic is too, since conversions and roots are done
// by a unit that is four times as slow.
#include "cuda/common/gather/args.h"
#include "cuda/common/grid_control.cuh"
#include "cuda/common/numbers.cuh"
#include "cuda/common/ptx.cuh"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBins = 256, kFine = 256;         // codes are 256 bin + fine
constexpr int kEach = 8;                        // codes of a thread: 16 bytes
constexpr int kAtOnce = kThreads * kEach;       // keys of a sweep's step
constexpr int kAhead = 3;                       // steps
constexpr int kCountShift = 20;                 // of a warp's bins
constexpr int kFullSteps = 4095 / (32 * kEach); // a warp's steps until a count may be full; 230 of excess each fit

struct Threshold {
  int code;  // keys with more are in, and of those with this
  int equal; // the first so many
  int kept;  // of all
};

struct ChooseShared {
  uint32_t warp_bins[kWarps][kBins];
  uint32_t count[kBins], excess[kBins]; // of all warps
  uint32_t fine[kFine];
  float below[kBins];       // energies of the bins below each
  uint32_t scan[2][kWarps]; // of a step and the next
  Threshold threshold;
  int bin; // that is looked at; -1: done
};

// The energy of bin 2 i + `odd`'s code `fine` beyond that of its first one, in 1/1024 of this: to 0.57. Energies are
// roots, so that with x = fine / 512.5, where the fraction begins at 1, or fine / 768.5, where it does at 1.5, it is
// 1024 (sqrt(1 + x) - 1).
__device__ inline uint32_t ExcessOf(uint32_t fine, bool odd) {
  const uint32_t linear = odd ? 2808682 : 4180869, square = odd ? 1085 : 1874;
  return (fine * (linear - fine * (square - fine)) + (1u << 21)) >> 22;
}

// The codes of a list's ranked keys, 8 per thread and step. body(first key, codes) for all threads of the CTA; codes of
// keys that are not ranked come as -1. Some steps are asked for ahead: a sweep is as fast as its loads.
template <typename Body>
__device__ void ForCodes(const uint16_t* codes, const DeviceSegment& segment, Body&& body) {
  const int begin = segment.first_key / kEach * kEach + static_cast<int>(threadIdx.x) * kEach;
  const int steps = (segment.end_key - segment.first_key / kEach * kEach + kAtOnce - 1) / kAtOnce;
  const auto load = [&](int step) {
    const int key = begin + step * kAtOnce;
    return key < segment.end_key ? __ldcg(reinterpret_cast<const uint4*>(codes + key)) : uint4{0, 0, 0, 0};
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
      int code[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const bool ranked = key + i >= segment.first_key && key + i < segment.end_key;
        code[i] = ranked ? static_cast<int>(word[i / 2] >> (i % 2 * 16) & 0xffff) : -1;
      }
      body(key, code);
    }
  }
}

class Chooser {
 public:
  __device__ Chooser(const KeyChoiceArgs& args, const DeviceSegment& segment, const uint16_t* codes,
                     ChooseShared& shared)
      : args_(args),
        segment_(segment),
        codes_(codes),
        sm_(shared),
        inverse_heads_(1.f / static_cast<float>(args.shape.heads)),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32) {}

  __device__ void Choose(int32_t* list) {
    CountBins();
    const int ranked = segment_.end_key - segment_.first_key;
    const bool by_gain = !isnan(args_.gain);
    int wanted;
    if (by_gain) {
      ByGain();
      wanted = sm_.threshold.kept;
    } else { // rounded up, but not for what a float's 0.1 is above the number
      wanted = min(ranked, static_cast<int>(ceil(args_.budget * ranked * (1 - 1e-7))));
    }
    if (!by_gain || wanted > args_.room) {
      __syncthreads(); // all have read it
      ByCount(min(wanted, args_.room), ranked);
    }
    Write(list + 2);
    if (threadIdx.x == 0) {
      list[0] = sm_.threshold.kept;
      list[1] = wanted;
    }
  }

 private:
  // ---------------------------------------------------------------- counts

  __device__ void CountBins() {
    for (int i = threadIdx.x; i < kWarps * kBins; i += kThreads) (&sm_.warp_bins[0][0])[i] = 0;
    for (int i = threadIdx.x; i < kBins; i += kThreads) sm_.count[i] = sm_.excess[i] = 0;
    __syncthreads();
    uint32_t* const bins = sm_.warp_bins[warp_];
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
    ForCodes(codes_, segment_, [&](int, const int(&code)[kEach]) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
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

  // Counts bin `bin`'s keys by code.
  __device__ void CountFine(int bin) {
    for (int i = threadIdx.x; i < kFine; i += kThreads) sm_.fine[i] = 0;
    __syncthreads();
    ForCodes(codes_, segment_, [&](int, const int(&code)[kEach]) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (code[i] >= 0 && code[i] / kFine == bin) atomicAdd(&sm_.fine[code[i] % kFine], 1u);
      }
    });
    __syncthreads();
  }

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

  // ---------------------------------------------------------------- thresholds

  __device__ bool Worth(float energy, float rest) const { return energy * sqrtf(fmaxf(rest, 0)) >= args_.gain; }

  // The highest of 256 numbers, 8 per lane, for which `fails` says so, or -1.
  template <typename Fails>
  __device__ int HighestOf(Fails&& fails) const {
    int highest = -1;
#pragma unroll
    for (int i = 0; i < 8; ++i) highest = fails(i) ? lane_ * 8 + i : highest;
    return __reduce_max_sync(~0u, highest);
  }

  __device__ float Energy(int code) const { return EnergyOf(code, inverse_heads_); }
  __device__ float LowerEnd(int bin) const { return Energy(bin * kFine); }
  __device__ float EnergyOfBin(int bin) const {
    return LowerEnd(bin) * fmaf(static_cast<float>(sm_.excess[bin]), 1.f / 1024, static_cast<float>(sm_.count[bin]));
  }

  __device__ void ByGain() {
    // The highest bin with keys of which the last is perhaps not worth it.
    if (warp_ == 0) {
      float x[8], below[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = EnergyOfBin(lane_ * 8 + i);
      SumBelow(x, below);
#pragma unroll
      for (int i = 0; i < 8; ++i) sm_.below[lane_ * 8 + i] = below[i];
      const int bin = HighestOf([&](int i) {
        const float lower = LowerEnd(lane_ * 8 + i);
        return sm_.count[lane_ * 8 + i] > 0 && !Worth(lower, below[i] + lower);
      });
      if (lane_ == 0) sm_.bin = bin;
    }
    __syncthreads();
    while (true) {
      const int bin = sm_.bin;
      if (bin < 0) { // everything is in
        if (threadIdx.x == 0) sm_.threshold = {-1, 0, segment_.end_key - segment_.first_key};
        break;
      }
      CountFine(bin);
      if (warp_ == 0) EndGainIn(bin);
      __syncthreads();
      if (sm_.bin == bin) break;
    }
    __syncthreads();
  }

  // Where in the bin the gain ends; if it doesn't, the next bin is to be looked at. One warp.
  __device__ void EndGainIn(int bin) {
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

  // The best `count` of them.
  __device__ void ByCount(int count, int ranked) {
    if (count >= ranked || count == 0) {
      if (threadIdx.x == 0) sm_.threshold = {count == 0 ? 65536 : -1, 0, count};
      __syncthreads();
      return;
    }
    // The bin in which the count is reached, and in it the code.
    int above = 0;
    const int bin = Reaches(sm_.count, count, above);
    CountFine(bin);
    const int fine = Reaches(sm_.fine, count, above);
    if (threadIdx.x == 0) sm_.threshold = {bin * kFine + fine, count - above, count};
    __syncthreads();
  }

  // From the highest number down, the one at which `count` is reached; `above` grows by those above it. Every warp
  // finds it for itself.
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
    const int hit = __ffs(__ballot_sync(~0u, at >= 0)) - 1; // one lane has it
    above = __shfl_sync(~0u, before, hit);
    return __shfl_sync(~0u, at, hit);
  }

  // ---------------------------------------------------------------- the list

  __device__ void Write(int32_t* keys) {
    const Threshold threshold = sm_.threshold;
    int above = 0, equal = 0, turn = 0; // before this step
    ForCodes(codes_, segment_, [&](int key, const int(&code)[kEach]) {
      uint32_t in = 0, tie = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        in |= static_cast<uint32_t>(code[i] > threshold.code) << i;
        tie |= static_cast<uint32_t>(code[i] == threshold.code) << i;
      }
      if (threshold.code < 0) { // all that are ranked
        in = 0;
        tie = 0;
#pragma unroll
        for (int i = 0; i < kEach; ++i) in |= static_cast<uint32_t>(code[i] >= 0) << i;
      }
      // Both numbers in one word: a step has 2,048 keys.
      const uint32_t own = __popc(in) | __popc(tie) << 16;
      uint32_t sum = own;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const uint32_t lower = __shfl_up_sync(~0u, sum, d);
        if (lane_ >= d) sum += lower;
      }
      turn ^= 1; // the other sums may still be read
      if (lane_ == 31) sm_.scan[turn][warp_] = sum;
      __syncthreads();
      uint32_t before = sum - own, all = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const uint32_t its = sm_.scan[turn][w];
        before += w < warp_ ? its : 0;
        all += its;
      }
      int ties = equal + static_cast<int>(before >> 16); // before the next key
      int32_t* to = keys + above + (before & 0xffff) + min(ties, threshold.equal);
      if (own != 0) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const bool is_tie = tie >> i & 1;
          if ((in >> i & 1) || (is_tie && ties < threshold.equal)) *to++ = key + i;
          ties += is_tie;
        }
      }
      above += static_cast<int>(all & 0xffff);
      equal += static_cast<int>(all >> 16);
    });
  }

  const KeyChoiceArgs& args_;
  const DeviceSegment& segment_;
  const uint16_t* const codes_;
  ChooseShared& sm_;
  const float inverse_heads_;
  const int warp_, lane_;
};

__global__ void __launch_bounds__(kThreads, 4) ChooseKernel(const __grid_constant__ KeyChoiceArgs args) {
  __shared__ ChooseShared shared;
  const RankShape& a = args.shape;
  const int of_round = static_cast<int>(blockIdx.x) >> a.log2_lists;
  const int in_slot = static_cast<int>(blockIdx.x) - (of_round << a.log2_lists);
  RankSlot slot;
  if (!PlaceSlot(a, args.first_slot + of_round, slot) || in_slot >= slot.lists) return;
  const DeviceSequence& s = slot.sequence;
  int32_t* const list = args.lists + slot.ListRow(a, in_slot) * args.stride;
  const DeviceSegment segment = SegmentAt(a, s, slot.Segment(a, in_slot));
  const bool whole = s.k_len <= a.rules.dense_up_to_keys || KeepsEverything(a.d.p, a.rules, s);
  if (whole || segment.first_key == segment.end_key) {
    if (threadIdx.x < 2) list[threadIdx.x] = 0;
    return;
  }
  const uint16_t* const codes = args.codes + int64_t{blockIdx.x} * args.code_stride;
  Chooser(args, segment, codes, shared).Choose(list);
}

__global__ void EmptyListsKernel(int32_t* lists, int64_t rows, int64_t stride) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row < rows) lists[row * stride] = lists[row * stride + 1] = 0;
}

} // namespace

cudaError_t LaunchKeyChoice(const KeyChoiceArgs& args, cudaStream_t stream) {
  const int64_t grid = int64_t{args.end_slot - args.first_slot} << args.shape.log2_lists;
  if (grid == 0) return cudaSuccess;
  ChooseKernel<<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchEmptyLists(const BlockMask& mask, cudaStream_t stream) {
  const int64_t rows = HasKeyLists(mask) ? mask.heads * mask.segment_rows : 0;
  if (rows == 0) return cudaSuccess;
  EmptyListsKernel<<<static_cast<unsigned>(DivUp<int64_t>(rows, 256)), 256, 0, stream>>>(mask.key_lists, rows,
                                                                                         KeyListStride(mask));
  return cudaGetLastError();
}

} // namespace flashprefill::cuda
