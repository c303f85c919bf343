// Selection by verticals and slashes, FlexPrefill's and MInference's, from the host's side: the parts that both share.
// First the softmax of a head's last rows is added up by key and by slash (sums.cu), then the method chooses from these
// sums (choice.cu, map.cu), and the choices become the mask (mask.cu). Nothing is read back between the launches. Plain
// C++.
#ifndef FLASHPREFILL_CUDA_COMMON_VERTICAL_SLASH_PLAN_H_
#define FLASHPREFILL_CUDA_COMMON_VERTICAL_SLASH_PLAN_H_

#include <limits>

#include "cuda/common/energies/forced.h"
#include "cuda/common/vertical_slash/args.h"

namespace flashprefill::cuda {

struct VerticalSlashPlan {
  Problem p;
  Gpu gpu;
  VerticalSlashShape shape;
  bool keeps_everything; // no sequence is selected for, whatever the lengths on the device are
  int64_t block_room;    // blocks of a sequence at most
  int64_t token_words;   // 32-bit words of a set of tokens
  int64_t heads;         // (sequence, query head)

  Means means;
  // Scratch memory; null where it is not needed, and in a size query.
  float *lse = nullptr, *vertical_sums = nullptr, *slash_sums = nullptr;
  VerticalSlashChoice choice = {};

  // `rows`: probe rows per head. Sequences of at most `dense_up_to_keys` keys are too short to select for.
  static VerticalSlashPlan Of(const Problem& p, const Policy& policy, const Gpu& gpu, int rows,
                              int64_t dense_up_to_keys);
  const char* Unsupported() const;

  // k_means: the method reads the means of K. slash_sets: sets of slashes per head, each of slash_room bits.
  void Take(Workspace& workspace, bool correction, bool k_means, int slash_sets, int64_t slash_room);

  // Arguments, but for the method's part of them.
  SumsArgs Sums() const;
  VerticalSlashMaskArgs Mask(const SelectTarget& target) const;

  // Pools K and V where their means are wanted.
  cudaError_t LaunchPooling(cudaStream_t stream) const;
};

inline int ToInt(int64_t x) { return static_cast<int>(std::min<int64_t>(x, std::numeric_limits<int32_t>::max())); }

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_VERTICAL_SLASH_PLAN_H_
