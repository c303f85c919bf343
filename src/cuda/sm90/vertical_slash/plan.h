// Select on the GPU for policies that choose by head: FlexPrefill and MInference. Plain C++.
#ifndef FLASHPREFILL_CUDA_SELECT_VERTICAL_SLASH_H_
#define FLASHPREFILL_CUDA_SELECT_VERTICAL_SLASH_H_

#include <cuda_runtime_api.h>

#include "core/backend.h"
#include "core/types.h"

namespace flashprefill::cuda {

bool ChoosesByHead(const Policy& policy);

// Whether means of K's blocks are wanted.
bool VerticalSlashNeedsMeans(const Policy& policy);

// Null if LaunchSelectVerticalSlash does this problem and policy, else what it would need, in words.
const char* SelectVerticalSlashUnsupported(const Problem& problem, const Policy& policy);

// Scratch memory; pointers are null where nothing is needed there, and in a size query. sm90/lines.h has the shapes.
struct VerticalSlashScratch {
  float *lse, *column, *diagonal;
  float *by_block, *map_lse;
  int *budget, *aware;
  uint32_t *columns, *distances, *column_tokens, *distance_tokens;
  void *q_means, *map_states;
  uint32_t *map_equal, *map_counts;
  uint64_t* map_rests;

  static VerticalSlashScratch Take(Workspace& workspace, const Problem& p, const Policy& policy);
};

// Puts select on the stream. k_means: of LaunchPool, if VerticalSlashNeedsMeans. `zeroed` as in LaunchSelect.
cudaError_t LaunchSelectVerticalSlash(const Problem& problem, const Policy& policy, const BlockMask& mask,
                                      const void* k_means, const VerticalSlashScratch& scratch, int* zeroed,
                                      cudaStream_t stream);

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SELECT_VERTICAL_SLASH_H_
