// The arithmetic of select by energies, one table of functions for each instruction set.
#ifndef FLASHPREFILL_CPU_ENERGIES_KERNELS_H_
#define FLASHPREFILL_CPU_ENERGIES_KERNELS_H_

#include "core/types.h"
#include "cpu/energies/plan.h"

namespace flashprefill::cpu {

struct EnergyKernels {
  // Writes the columns of blocks [begin, end) of KV heads [head_begin, head_end) into the sequence's panels, which lie
  // as [kv_heads][panels]. metric: the weight of a dimension in a key's distance from the mean, [kv_heads][head_dim];
  // read where the first term has a variance. scratch: DescribeScratch() floats.
  void (*describe)(const Problem& p, const EnergyPlan& plan, const Sequence& s, int64_t begin, int64_t end,
                   int head_begin, int head_end, const float* metric, float* panels, float* scratch);
  // Loads query tokens [begin, end) of query heads [head_begin, head_end) as rows to be scored, [head][row][depth].
  void (*load_rows)(const Problem& p, const EnergyPlan& plan, const Sequence& s, int64_t begin, int64_t end,
                    int head_begin, int head_end, float* rows);
  // Adds the energies of n rows into the sums of one panel's blocks. sums are relative to 2^largest, block by block.
  // Row r sees the panel's first visible[r] blocks.
  void (*score)(const Problem& p, const EnergyPlan& plan, const float* panel, const float* rows, int n,
                const int32_t* visible, float* largest, float* sums);
  // Makes sums relative to the largest of all: energies. Returns the largest energy.
  float (*energies)(int64_t blocks, const float* largest, float* sums);
};

// A sum before anything was added to it: `largest` is then this. Lower than any exponent, and finite, so that the
// difference of two of them is a number.
constexpr float kNothing = -3.0e38f;

inline int64_t DescribeScratch(const Problem& p, const EnergyPlan& plan) {
  const int64_t d = p.head_dim;
  return std::max(p.kv_heads * d, plan.g.block_size * (d + 1) + 2 * d); // see DescribeMeans and DescribeSketch
}

const EnergyKernels& EnergyKernelsFor(const Exec& exec);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_ENERGIES_KERNELS_H_
