// Attend from the host's side: its limits, its scratch memory, its arguments and its launch. Plain C++. The kernels are
// sm90/attend/attend.cuh and sm80/attend/attend.cuh.
#ifndef FLASHPREFILL_CUDA_COMMON_ATTEND_PLAN_H_
#define FLASHPREFILL_CUDA_COMMON_ATTEND_PLAN_H_

#include <functional>

#include "cuda/common/attend/images.h"
#include "cuda/common/keys/key_copy.h"
#include "cuda/selector.h"

namespace flashprefill::cuda {

struct AttendArgs;

// The arguments are those of fp_attend, checked by core/validate.cc; every array they name is device memory.
class AttendPlan {
 public:
  // The mask's bits may be null where it has no words: then no key is seen.
  static AttendPlan Of(const Problem& p, const BlockMask& mask, const Gpu& gpu, int32_t math);

  // Null if the kernel does this problem, else the requirement that is not met, in words.
  const char* Unsupported(const Output* output) const;

  // The counter of tiles handed out: a word that is zero when the kernel starts. Their order, if it is made. And K and
  // V as the kernel wants them, where that is not as they are.
  void Take(Workspace& workspace) {
    counter_ = workspace.Take<int>(1);
    if (ordered_items_ > 0) order_ = workspace.Take<int>(ordered_items_);
    if (keys_ == Keys::kImages) images_ = Images::Take(workspace, *p_, mask_->block_size, mask_->mean_correction != 0);
    if (keys_ == Keys::kCopied) copy_ = KeyCopy::Take(workspace, *p_, true);
  }
  int* counter() const { return counter_; }

  // Puts the kernel on the stream. No allocation, no synchronisation; may be captured in a graph, where the device
  // arrays' contents (lengths, page tables, masks) may change between replays. `means`: for mean_correction, the means
  // of the blocks of K and of V; rows that are no block's are not read into products. follows_select: the launch before
  // this one on the stream is select's, which has set the counter to zero; else a kernel that does so comes first. The
  // kernel's start hides behind the end of either. uneven: tiles may keep unequal numbers of blocks, so that it can pay
  // to take the heaviest first. beside: puts a kernel on the stream that attention needs nothing of, and that waits for
  // the one before it in all of its CTAs, then lets the next one start: it runs while attention begins.
  cudaError_t Launch(const Output& output, const Means& means, bool follows_select, bool uneven, cudaStream_t stream,
                     const std::function<cudaError_t()>& beside = {}) const;

 private:
  // How the kernel gets K and V.
  enum class Keys {
    kInPlace,
    kCopied, // one after another, from pages that are too small for bulk copies
    kImages  // in 8 bits
  };
  Keys KeysFor(int32_t math) const;
  int64_t MaxItems() const; // query tiles of all heads, or more

  const Problem* p_;
  const BlockMask* mask_;
  Gpu gpu_;
  int64_t ordered_items_ = 0; // at most so many tiles of all heads are put in order; 0: they are taken as they come
  int* counter_ = nullptr;
  int* order_ = nullptr;
  Keys keys_ = Keys::kInPlace;
  Images images_;
  KeyCopy copy_;
};

// One call, as the kernels of an architecture get it from the plan.
struct AttendCall {
  const Problem& p;
  const BlockMask& mask;
  const Gpu& gpu;
  const Output& output;
  const Means& means;
  int64_t items; // tiles of all heads, at most
  bool beside;   // the launch before is one that the kernel need not wait for, but at its end
};
cudaError_t LaunchAttendSm90(const AttendArgs& args, const AttendCall& call, cudaStream_t stream);
cudaError_t LaunchAttend8Sm90(const AttendArgs& args, const AttendCall& call, const Images& images,
                              cudaStream_t stream);
cudaError_t LaunchAttendPortable(const AttendArgs& args, const AttendCall& call, cudaStream_t stream);

// Smallest padded head dimension, of those that there is a kernel for.
inline int PaddedHeadDim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

// The largest power of 2 in all of these bits' numbers, and no more keys than a step takes: keys that lie together.
inline int ChunkKeys(int sizes, int keys_per_step) { return std::min(sizes & -sizes, keys_per_step); }

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_ATTEND_PLAN_H_
