// Select on the GPU, from the host's side: scratch memory and launches. Plain C++.
#ifndef FLASHPREFILL_CUDA_SELECT_H_
#define FLASHPREFILL_CUDA_SELECT_H_

#include <cuda_runtime_api.h>

#include "core/backend.h"
#include "core/types.h"
#include "cuda/select_vertical_slash.h"
#include "cuda/strided.h"

namespace flashprefill::cuda {

// Scratch memory of a call. Pointers are null where nothing is needed there, and in a size query.
struct SelectScratch {
  void* k_means; // [kv_heads, MeanRows, head_dim], as attend.h wants them
  void* v_means;
  void* sketch;
  float* metric;
  void* q_rows;
  StridedScratch grid;
  VerticalSlashScratch lines;

  // What select needs for this policy, and with `correction` the means of K and V too, for attend.
  static SelectScratch Take(Workspace& workspace, const Problem& p, const Policy& policy, bool correction);
};

// Null if select does this problem and policy, else what it would need, in words.
const char* SelectUnsupported(const Problem& problem, const Policy& policy);

// Room for the means of a problem's blocks, in the layout of attend.h; several such arrays, one after another.
void* TakeMeans(Workspace& workspace, const Problem& problem, int block_size, int planes = 1);

// Puts select on the stream, and with `correction` the pooling of K and V for attend, in the same pass. `zeroed`, if
// not null, says that attend follows, which may start before the last launch is done (AttendArgs::follows_select): it
// is set to zero, and sequences too short to gain from a selection keep everything and are reported as
// FP_FALLBACK_SHORT.
cudaError_t LaunchSelect(const Problem& problem, const Policy& policy, const BlockMask& mask,
                         const SelectScratch& scratch, bool correction, int* zeroed, cudaStream_t stream);

// The means alone, for an attend with correction that follows no select.
cudaError_t LaunchMeans(const Problem& problem, const BlockMask& mask, void* k_means, void* v_means,
                        cudaStream_t stream);

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SELECT_H_
