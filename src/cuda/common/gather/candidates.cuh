// A list's keys from candidates, so that its codes are read once. A sample of an eighth of the codes, whole sectors of
// memory, says above which code the list's keys lie, but for a margin. One sweep over the codes copies those above it
// to shared memory and adds up the energies of all others; everything after that looks at candidates alone, some 1.3
// for each key that is kept.
//
// A warp takes 512 keys per step and makes room for their candidates by one atomic addition; a table says where each
// step's are, so that they can be read in the order of their keys. So there is no barrier in the sweep. All of it
// takes 36 instructions of a warp for 32 codes, where counts, threshold and list from all codes take 78: instructions
// decide how fast the choice is.
//
// Where the sample was wrong, or candidates have no room, they do not tell, and the list is chosen from all codes.
#ifndef FLASHPREFILL_CUDA_COMMON_GATHER_CANDIDATES_CUH_
#define FLASHPREFILL_CUDA_COMMON_GATHER_CANDIDATES_CUH_

#include "cuda/common/gather/key_bins.cuh"

namespace flashprefill::cuda {

class Candidates {
  static constexpr int kEach = 8, kRows = 2; // codes of a thread, 16 bytes, in each row of a step
  static constexpr int kRowKeys = 32 * kEach, kStepKeys = kRows * kRowKeys;
  static constexpr int kSampled = 8, kSectorKeys = 16; // one sector of so many; of 32 bytes
  static constexpr int kSampledKeys = kSampled * kSectorKeys;
  static constexpr int kLeastSampled = 2048; // ranked keys; of fewer all are candidates

 public:
  static constexpr int kMostSteps = 2048; // of a table: 2^20 keys

  // Steps that a list of all keys takes, wherever its first one lies in a step.
  static int64_t StepsOf(int64_t keys) { return DivUp<int64_t>(keys, kStepKeys) + 1; }

  // memory: two tables of args.table_steps, and args.most_candidates.
  __device__ Candidates(const KeyChoiceArgs& args, const DeviceSegment& segment, const uint16_t* codes,
                        const KeyBins& bins, ChooseShared& shared, uint32_t* memory)
      : args_(args),
        segment_(segment),
        codes_(codes),
        bins_(bins),
        sm_(shared),
        place_(memory),
        before_(memory + args.table_steps),
        entries_(memory + 2 * args.table_steps),
        origin_(segment.first_key / kStepKeys * kStepKeys),
        steps_((segment.end_key - origin_ + kStepKeys - 1) / kStepKeys),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32) {}

  // Finds them. wanted: keys, by budget. least_energy: by gain, no key below this is in. False if they have no room.
  __device__ bool Collect(bool by_gain, int wanted, float least_energy) {
    if (steps_ > args_.table_steps) return false;
    least_energy_ = least_energy;
    if (segment_.end_key - segment_.first_key >= kLeastSampled) Sample(by_gain, wanted);
    if (threadIdx.x == 0) sm_.candidates = 0;
    __syncthreads();
    Sweep();
    return sm_.candidates <= args_.most_candidates;
  }

  __device__ int count() const { return sm_.candidates; }
  __device__ int floor() const { return floor_; }     // the lowest code that they may have
  __device__ float others() const { return others_; } // what all other keys hold
  // Whether all keys that a gain may keep are among them.
  __device__ bool has_all_of_gain() const { return floor_ == 0 || bins_.LowerEnd(floor_ / kFine) < least_energy_; }

  // The caller has cleared the bins.
  __device__ void CountBins() const {
    ForAll([&](int code) {
      const uint32_t fine = code % kFine, bin = code / kFine;
      atomicAdd(&sm_.count[bin], 1u);
      atomicAdd(&sm_.excess[bin], ExcessOf(fine, bin % 2));
    });
    __syncthreads();
  }

  __device__ void CountFine(int bin) const {
    for (int i = threadIdx.x; i < kFine; i += kChooseThreads) sm_.fine[i] = 0;
    __syncthreads();
    ForAll([&](int code) {
      if (code / kFine == bin) atomicAdd(&sm_.fine[code % kFine], 1u);
    });
    __syncthreads();
  }

  __device__ void Write(int32_t* keys) const {
    for (int step = warp_; step < steps_; step += kChooseWarps) {
      uint32_t both = 0; // how many are in, and at the threshold
      ForEntries(step, [&](uint32_t, uint32_t in, uint32_t tie) { both += __popc(in) | __popc(tie) << 16; });
      if (lane_ == 0) before_[step] = both;
    }
    __syncthreads();
    SumSteps();
    const uint32_t lower_lanes = (1u << lane_) - 1;
    const int equal = sm_.threshold.equal;
    for (int step = warp_; step < steps_; step += kChooseWarps) {
      int above = static_cast<int>(before_[step] & 0xffff), ties = static_cast<int>(before_[step] >> 16);
      ForEntries(step, [&](uint32_t entry, uint32_t in, uint32_t tie) {
        const int my_ties = ties + __popc(tie & lower_lanes);
        const bool is_in = (in >> lane_ & 1) || ((tie >> lane_ & 1) && my_ties < equal);
        const int at = above + __popc(in & lower_lanes) + min(my_ties, equal);
        if (is_in) keys[at] = origin_ + step * kStepKeys + static_cast<int>(entry >> 16);
        above += __popc(in);
        ties += __popc(tie);
      });
    }
  }

 private:
  // ---------------------------------------------------------------- the sample

  // Sets the candidates' lowest code, the first of a bin.
  __device__ void Sample(bool by_gain, int wanted) {
    bins_.Clear();
    __syncthreads();
    const int half = threadIdx.x % 2 * kEach;
    int at = segment_.first_key / kSampledKeys * kSampledKeys + static_cast<int>(threadIdx.x / 2) * kSampledKeys;
#pragma unroll 2
    for (; at < segment_.end_key; at += kChooseThreads / 2 * kSampledKeys) {
      // Which sector of eight changes, lest it be the same of every block.
      const int key = at + at / kSampledKeys * 5 % kSampled * kSectorKeys + half;
      if (key < segment_.first_key || key + kEach > segment_.end_key) continue;
      const uint4 four = __ldcg(reinterpret_cast<const uint4*>(codes_ + key));
      const uint32_t word[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < kEach; ++i) atomicAdd(&sm_.count[word[i / 2] >> (i % 2 * 16 + 8) & 0xff], 1u);
    }
    __syncthreads();
    if (warp_ == 0) {
      int bin;
      if (by_gain) { // one bin below that in which the gain seems to end; the mean key of a bin holds 1.09 of its end
        bin = max(bins_.LastOfGain(1.09f * kSampled, 0) - 1, bins_.HighestBelow(least_energy_));
      } else { // a tenth more than are wanted, and three deviations
        const float seen = static_cast<float>(wanted) / kSampled;
        int above = 0;
        bin = bins_.Reaches(sm_.count, static_cast<int>(1.1f * seen + 3 * sqrtf(seen)) + 1, above);
      }
      if (lane_ == 0) sm_.bin = max(0, bin);
    }
    __syncthreads();
    floor_ = sm_.bin * kFine;
  }

  // ---------------------------------------------------------------- the sweep

  __device__ void Sweep() {
    uint4 ahead[kRows]; // of the warp's next step
    const auto load = [&](int step) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int key = origin_ + step * kStepKeys + r * kRowKeys + lane_ * kEach;
        ahead[r] = key < segment_.end_key ? __ldcg(reinterpret_cast<const uint4*>(codes_ + key)) : uint4{0, 0, 0, 0};
      }
    };
    float others = 0;
    load(warp_);
#pragma unroll 1
    for (int step = warp_; step < steps_; step += kChooseWarps) {
      uint32_t word[kRows * 4];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        word[4 * r] = ahead[r].x;
        word[4 * r + 1] = ahead[r].y;
        word[4 * r + 2] = ahead[r].z;
        word[4 * r + 3] = ahead[r].w;
      }
      load(step + kChooseWarps);
      Step(step, word, others);
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) others += __shfl_xor_sync(~0u, others, d);
    if (lane_ == 0) sm_.others[warp_] = others;
    __syncthreads();
    others_ = 0;
#pragma unroll
    for (int w = 0; w < kChooseWarps; ++w) others_ += sm_.others[w];
    others_ *= sqrtf(1.f / static_cast<float>(args_.shape.heads));
  }

  __device__ __forceinline__ void Step(int step, uint32_t (&word)[kRows * 4], float& others) {
    uint32_t in = 0, there = ~0u;
    if (step == 0 || step == steps_ - 1) { // there may be keys that are not ranked
      const int first = origin_ + step * kStepKeys + lane_ * kEach;
#pragma unroll
      for (int i = 0; i < kRows * kEach; ++i) {
        const int key = first + i / kEach * kRowKeys + i % kEach;
        if (key >= segment_.first_key && key < segment_.end_key) continue;
        there &= ~(1u << i);
        word[i / 2] &= i % 2 ? 0xffffu : 0xffff0000u; // code 0 holds next to nothing
      }
    }
    const auto code = [&](int i) { return i % 2 ? word[i / 2] >> 16 : word[i / 2] & 0xffff; };
#pragma unroll
    for (int i = 0; i < kRows * kEach; ++i) {
      const bool is = code(i) >= static_cast<uint32_t>(floor_);
      in |= static_cast<uint32_t>(is) << i;
      others += is ? 0.f : SquareRoot(SquaresOf(static_cast<int>(code(i))));
    }
    in &= there;
    // Both rows' counts in one word.
    const uint32_t own = __popc(in & 0xff) | __popc(in >> kEach) << 16, sum = SumUpToLane(own, lane_);
    const uint32_t all = __shfl_sync(~0u, sum, 31);
    const int count = static_cast<int>((all & 0xffff) + (all >> 16));
    int place = 0;
    if (lane_ == 0) {
      place = atomicAdd(&sm_.candidates, count);
      place_[step] = static_cast<uint32_t>(place) << kCountBits | static_cast<uint32_t>(count);
    }
    place = __shfl_sync(~0u, place, 0);
    if (place + count > args_.most_candidates) return; // then all codes are looked at
    const uint32_t before = sum - own;
    uint32_t* to = entries_ + place + (before & 0xffff);
#pragma unroll
    for (int i = 0; i < kRows * kEach; ++i) {
      if (i == kEach) to = entries_ + place + (all & 0xffff) + (before >> 16);
      const uint32_t key = lane_ * kEach + i / kEach * kRowKeys + i % kEach; // of the step
      if (in >> i & 1) *to++ = key << 16 | code(i);
    }
  }

  // ---------------------------------------------------------------- after it

  template <typename Body>
  __device__ void ForAll(Body&& body) const {
    for (int i = threadIdx.x; i < sm_.candidates; i += kChooseThreads) body(static_cast<int>(entries_[i] & 0xffff));
  }

  // body(entry, which lanes' entries are above the threshold, which are at it) for a step's entries, 32 at a time.
  template <typename Body>
  __device__ __forceinline__ void ForEntries(int step, Body&& body) const {
    const uint32_t* const entries = entries_ + (place_[step] >> kCountBits);
    const int count = static_cast<int>(place_[step] & ((1u << kCountBits) - 1));
    for (int i = lane_; i - lane_ < count; i += 32) {
      const uint32_t entry = i < count ? entries[i] : 0;
      const int code = i < count ? static_cast<int>(entry & 0xffff) : -2;
      body(entry, __ballot_sync(~0u, code > sm_.threshold.code), __ballot_sync(~0u, code == sm_.threshold.code));
    }
  }

  // Each step's counts become those of the steps before it. A thread has neighbouring steps.
  __device__ void SumSteps() const {
    const int each = (steps_ + kChooseThreads - 1) / kChooseThreads, first = static_cast<int>(threadIdx.x) * each;
    const int end = min(first + each, steps_);
    uint32_t own = 0;
    for (int i = first; i < end; ++i) own += before_[i];
    const uint32_t sum = SumUpToLane(own, lane_);
    if (lane_ == 31) sm_.scan[0][warp_] = sum;
    __syncthreads();
    uint32_t before = sum - own;
#pragma unroll
    for (int w = 0; w < kChooseWarps; ++w) before += w < warp_ ? sm_.scan[0][w] : 0;
    for (int i = first; i < end; ++i) {
      const uint32_t its = before_[i];
      before_[i] = before;
      before += its;
    }
    __syncthreads();
  }

  static constexpr int kCountBits = 10; // of a step's count; above them, its first entry
  static_assert(kStepKeys < 1 << kCountBits);

  const KeyChoiceArgs& args_;
  const DeviceSegment& segment_;
  const uint16_t* const codes_;
  const KeyBins& bins_;
  ChooseShared& sm_;
  uint32_t *const place_, *const before_; // of each step's entries: where they begin and how many; SumSteps
  uint32_t* const entries_;               // key of the step, code
  const int origin_, steps_;              // the first step's first key
  const int warp_, lane_;
  int floor_ = 0;
  float others_ = 0, least_energy_ = 0;
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_GATHER_CANDIDATES_CUH_
