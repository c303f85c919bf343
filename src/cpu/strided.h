// What XAttention and RRAttention share: how rows of the grid are divided among threads, and how their masses become
// bits. Each of the two says what the cells are, what a row is, and what is kept.
#ifndef FLASHPREFILL_CPU_STRIDED_H_
#define FLASHPREFILL_CPU_STRIDED_H_

#include "core/types.h"
#include "cpu/strided_kernels.h"

namespace flashprefill::cpu {

struct StridedMethod {
  int stride;
  int64_t depth;   // floats of a cell
  bool cell_means; // cells are means of keys, made once; else they are the keys themselves, read as they are needed
  // Fills column `lane` of a panel with the row of the tile's cell that begins at query `begin`, in exponents of two.
  // row: scratch memory of head_dim floats. Returns how many cells of keys it sees.
  int64_t (*fill_lane)(const Problem& p, const Policy& policy, const StridedKernels& kernels, const Sequence& s,
                       const Tile& tile, int64_t begin, int head, float* row, float* lane);
  // Sets the bits of what is kept by mass, forced blocks aside. keys: scratch memory, a word a block.
  void (*keep)(const Policy& policy, const Tile& tile, int head, const float* mass, uint64_t* keys, uint64_t* row);
};

size_t StridedWorkspace(const StridedMethod& method, const Problem& p, const Policy& policy, const Exec& exec);
void StridedSelect(const StridedMethod& method, const Problem& p, const Policy& policy, const Exec& exec,
                   BlockMask& mask, void* workspace);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_STRIDED_H_
