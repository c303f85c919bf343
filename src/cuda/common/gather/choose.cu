// From codes of energies to a list of keys, a CTA for each list: from candidates (candidates.cuh), which is one sweep
// over the codes, or where those do not tell from all codes (all_codes.cuh).
#include <algorithm>

#include "cuda/common/gather/all_codes.cuh"
#include "cuda/common/gather/candidates.cuh"
#include "cuda/common/launch.h"

namespace flashprefill::cuda {
namespace {

constexpr int kSharedBytes = 51 << 10; // of candidates and their tables: room for four CTAs per multiprocessor
static_assert(AllCodes::kBytes <= kSharedBytes);

class Chooser {
 public:
  __device__ Chooser(const KeyChoiceArgs& args, const DeviceSegment& segment, const uint16_t* codes,
                     ChooseShared& shared, uint32_t* memory)
      : args_(args),
        segment_(segment),
        codes_(codes),
        sm_(shared),
        memory_(memory),
        bins_(args, shared),
        ranked_(segment.end_key - segment.first_key),
        by_gain_(!isnan(args.gain)) {}

  __device__ void Choose(int32_t* list) {
    const int wanted = FromCandidates(list + 2);
    const int all = wanted >= 0 ? wanted : FromAllCodes(list + 2);
    if (threadIdx.x != 0) return;
    list[0] = sm_.threshold.kept;
    list[1] = all;
  }

 private:
  // Both return how many keys are wanted; this one -1 if candidates do not tell.
  __device__ int FromCandidates(int32_t* keys) {
    Candidates candidates(args_, segment_, codes_, bins_, sm_, memory_);
    // The energies of all keys sum to sqrt(heads) at most, so that no gain is reached below this.
    const float least = by_gain_ ? args_.gain * 0.99f * rsqrtf(sqrtf(static_cast<float>(args_.shape.heads))) : 0;
    if (!candidates.Collect(by_gain_, min(Budget(), args_.room), least)) return -1;
    Count(candidates);
    int wanted = Budget();
    if (by_gain_) {
      if (!EndGain(candidates, candidates.others())) {
        if (!candidates.has_all_of_gain()) return -1;
        KeepAll(candidates.floor() - 1, candidates.count());
      }
      wanted = sm_.threshold.kept;
    } else if (candidates.count() < min(wanted, args_.room)) {
      return -1;
    }
    if (!by_gain_ || wanted > args_.room) KeepBest(candidates, min(wanted, args_.room), candidates.count());
    candidates.Write(keys);
    return wanted;
  }

  __device__ int FromAllCodes(int32_t* keys) {
    __syncthreads(); // candidates are overwritten
    AllCodes all(segment_, codes_, sm_, memory_);
    Count(all);
    int wanted = Budget();
    if (by_gain_) {
      if (!EndGain(all, 0)) KeepAll(-1, ranked_);
      wanted = sm_.threshold.kept;
    }
    if (!by_gain_ || wanted > args_.room) KeepBest(all, min(wanted, args_.room), ranked_);
    all.Write(keys);
    return wanted;
  }

  // Rounded up, but not for what a float's 0.1 is above the number.
  __device__ int Budget() const {
    return by_gain_ ? 0 : min(ranked_, static_cast<int>(ceil(args_.budget * ranked_ * (1 - 1e-7))));
  }

  template <class Keys>
  __device__ void Count(Keys& keys) const {
    bins_.Clear();
    __syncthreads();
    keys.CountBins();
  }

  template <class Keys>
  __device__ bool EndGain(Keys& keys, float others) const {
    return bins_.EndGain(others, [&](int bin) { keys.CountFine(bin); });
  }

  // All keys with more than this code, which are so many.
  __device__ void KeepAll(int code, int count) const {
    __syncthreads(); // all have read the last threshold
    if (threadIdx.x == 0) sm_.threshold = {code, 0, count};
    __syncthreads();
  }

  // The best `count` of so many.
  template <class Keys>
  __device__ void KeepBest(Keys& keys, int count, int of) const {
    if (count == 0) return KeepAll(1 << 16, 0);
    if (count == ranked_ && of == ranked_) return KeepAll(-1, count);
    __syncthreads(); // all have read the last threshold
    bins_.EndCount(count, [&](int bin) { keys.CountFine(bin); });
  }

  const KeyChoiceArgs& args_;
  const DeviceSegment& segment_;
  const uint16_t* const codes_;
  ChooseShared& sm_;
  uint32_t* const memory_;
  const KeyBins bins_;
  const int ranked_;
  const bool by_gain_;
};

__global__ void __launch_bounds__(kChooseThreads, 4) ChooseKernel(const __grid_constant__ KeyChoiceArgs args) {
  extern __shared__ uint32_t memory[];
  __shared__ ChooseShared shared;
  const RankShape& a = args.shape;
  const int at = static_cast<int>(gridDim.x - 1 - blockIdx.x); // long lists first
  const int of_round = at >> a.log2_lists;
  const int in_slot = at - (of_round << a.log2_lists);
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
  const uint16_t* const codes = args.codes + int64_t{at} * args.code_stride;
  Chooser(args, segment, codes, shared, memory).Choose(list);
}

__global__ void EmptyListsKernel(int32_t* lists, int64_t rows, int64_t stride) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row < rows) lists[row * stride] = lists[row * stride + 1] = 0;
}

} // namespace

cudaError_t LaunchKeyChoice(KeyChoiceArgs args, cudaStream_t stream) {
  const int64_t grid = int64_t{args.end_slot - args.first_slot} << args.shape.log2_lists;
  if (grid == 0) return cudaSuccess;
  const int64_t steps = Candidates::StepsOf(args.shape.d.p.max_seqlen_k);
  args.table_steps = static_cast<int>(std::min<int64_t>(steps, Candidates::kMostSteps));
  args.most_candidates = kSharedBytes / 4 - 2 * args.table_steps;
  if (cudaError_t e = AllowSharedOnly(ChooseKernel, kSharedBytes)) return e;
  ChooseKernel<<<static_cast<unsigned>(grid), kChooseThreads, kSharedBytes, stream>>>(args);
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
