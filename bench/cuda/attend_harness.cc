// A door to the attend kernel for scripts: the C structs of the library in, one launch on a stream. Built as a shared
// library, so that attend_check.py and attend_bench.py drive it beside PyTorch in one process.
#include "cuda/attend.h"

extern "C" {

__attribute__((visibility("default"))) const char* attend_unsupported(const fp_problem* problem,
                                                                      const fp_block_mask* mask,
                                                                      const fp_output* output) {
  return flashprefill::cuda::AttendUnsupported(*problem, *mask, output);
}

__attribute__((visibility("default"))) int attend_launch(const fp_problem* problem, const fp_block_mask* mask,
                                                         const fp_output* output, const void* k_means,
                                                         const void* v_means, void* scratch, void* stream) {
  flashprefill::cuda::AttendArgs args{problem, mask, output, k_means, v_means, scratch};
  return static_cast<int>(flashprefill::cuda::LaunchAttend(args, static_cast<cudaStream_t>(stream)));
}

} // extern "C"
