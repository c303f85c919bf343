// The selections that rank single keys, Gather's and S2O's, from the host's side: mean queries by the pooling pass,
// sums and codes of energies by two products of all of them with all keys (rank.cuh), then what a method makes of the
// codes, then the rest of the mask (mask.cu). Codes take two bytes per key and list, too many at length for all lists
// at a time: they are made, chosen from and overwritten in rounds of some slots. Nothing is read back. Plain C++.
#ifndef FLASHPREFILL_CUDA_COMMON_GATHER_PLAN_H_
#define FLASHPREFILL_CUDA_COMMON_GATHER_PLAN_H_

#include "cuda/common/energies/forced.h"
#include "cuda/common/gather/args.h"

namespace flashprefill::cuda {

class RankPlan {
 public:
  // segment: query tokens per list.
  static RankPlan Of(const Problem& p, const Policy& policy, int64_t segment, const Gpu& gpu);
  const char* Unsupported() const;
  void Take(Workspace& workspace);

  // choose(arguments) puts a round's choice on the stream. A method sets its rule in the arguments: they come without.
  template <class Choose>
  cudaError_t Launch(const SelectTarget& target, Choose&& choose) const {
    const RankShape shape = ShapeFor(target);
    if (shape.d.p.max_seqlen_k <= shape.rules.dense_up_to_keys) return LaunchForced(shape.d, shape.rules, target);
    RankArgs rank{};
    if (cudaError_t error = LaunchSums(shape, target.stream, &rank)) return error;
    KeyChoiceArgs choice = ChoiceOf(shape, target.mask);
    for (int64_t first = 0; first < Slots(); first += RoundSlots()) {
      rank.first_slot = choice.first_slot = static_cast<int>(first);
      rank.end_slot = choice.end_slot = static_cast<int>(std::min(first + RoundSlots(), Slots()));
      if (cudaError_t error = LaunchCodes(rank, target.stream)) return error;
      if (cudaError_t error = choose(choice)) return error;
    }
    return LaunchMask(shape, target);
  }

 private:
  int64_t Pitch() const;
  int64_t Slots() const { return int64_t{shape_.slots} * shape_.d.p.kv_heads; }
  int64_t CodeStride() const { return DivUp<int64_t>(shape_.d.p.max_seqlen_k, kRankStep) * kRankStep; }
  int64_t RoundSlots() const;
  RankShape ShapeFor(const SelectTarget& target) const;
  cudaError_t LaunchMeanQueries(cudaStream_t stream) const;
  cudaError_t LaunchSums(const RankShape& shape, cudaStream_t stream, RankArgs* rank) const;
  cudaError_t LaunchCodes(const RankArgs& rank, cudaStream_t stream) const {
    return portable_ ? LaunchRankCodesPortable(rank, stream) : LaunchRankCodesSm90(rank, stream);
  }
  KeyChoiceArgs ChoiceOf(const RankShape& shape, const BlockMask& mask) const;
  static cudaError_t LaunchMask(const RankShape& shape, const SelectTarget& target);

  bool portable_, corrects_;
  RankShape shape_;
  // Scratch memory; null in a size query.
  uint16_t *rows_ = nullptr, *codes_ = nullptr;
  float* lse_ = nullptr;
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_GATHER_PLAN_H_
