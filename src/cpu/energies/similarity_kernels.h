// Self-similarity of the tokens of a block, one table of functions for each instruction set (SpargeAttn).
#ifndef FLASHPREFILL_CPU_ENERGIES_SIMILARITY_KERNELS_H_
#define FLASHPREFILL_CPU_ENERGIES_SIMILARITY_KERNELS_H_

#include "core/types.h"

namespace flashprefill::cpu {

struct SimilarityKernels {
  // sum [d] += the rows [n][d].
  void (*add_rows)(const float* rows, int64_t n, int64_t d, float* sum);
  // The mean cosine of all pairs of the n rows less `center` [d], which is the squared length of the mean of their unit
  // vectors. A row of length zero has the unit vector zero. sum: scratch memory of d floats.
  float (*similarity)(const float* rows, int64_t n, int64_t d, const float* center, float* sum);
};

const SimilarityKernels& SimilarityKernelsFor(const Exec& exec);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_ENERGIES_SIMILARITY_KERNELS_H_
