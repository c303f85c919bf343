// A position in a ring of stages that barriers guard.
#ifndef FLASHPREFILL_CUDA_COMMON_RING_CUH_
#define FLASHPREFILL_CUDA_COMMON_RING_CUH_

#include <cstdint>

namespace flashprefill::cuda {

// The next stage, and the parity of how often the ring has been passed: what BarrierWait asks a `full` barrier for.
// Who waits for an `empty` one asks for the other parity, so that the first pass finds every stage free.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void Advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }

  // At most once round. Parity tells one phase from the next only, so who leaves stages out must know that loads end in
  // order, or come back to its own stages alone (stages a multiple of count): else a wait for a stage's second phase
  // passes while its first is still under way.
  __device__ __forceinline__ void AdvanceBy(int count, int stages) {
    stage += count;
    if (stage >= stages) {
      stage -= stages;
      parity ^= 1;
    }
  }
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_RING_CUH_
