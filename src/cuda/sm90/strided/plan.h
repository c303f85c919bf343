// Selection by XAttention and RRAttention on the GPU, from the host's side. Plain C++.
#ifndef FLASHPREFILL_CUDA_STRIDED_H_
#define FLASHPREFILL_CUDA_STRIDED_H_

#include <cuda_runtime_api.h>

#include "core/backend.h"
#include "core/types.h"

namespace flashprefill::cuda {

inline bool IsStrided(const Policy& policy) { return policy.kind == FP_XATTENTION || policy.kind == FP_RRATTENTION; }

// Scratch memory of a call; null in a size query.
struct StridedScratch {
  void *k_cells, *q_rows, *sums, *stats; // as sm90/grid.h wants them

  static StridedScratch Take(Workspace& workspace, const Problem& p, const Policy& policy);
};

// Null if these kernels do this problem and policy, else what they would need, in words.
const char* StridedUnsupported(const Problem& p, const Policy& policy);

// Puts select on the stream: three launches for each chunk of tiles. `zeroed`, if not null, is set to zero by the last.
cudaError_t LaunchStrided(const Problem& p, const Policy& policy, const BlockMask& mask, const StridedScratch& scratch,
                          int* zeroed, cudaStream_t stream);

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_STRIDED_H_
