// The 8-bit attend kernel: its warps, barriers and registers. What each warp does: producer.cuh, attend.cuh.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_KERNEL_CUH_
#define FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_KERNEL_CUH_

#include "cuda/common/grid_control.cuh"
#include "cuda/sm90/attend_8bit/attend.cuh"
#include "cuda/sm90/attend_8bit/producer.cuh"

namespace flashprefill::cuda {

template <class T, class SHAPE>
__global__ void __launch_bounds__(kAttendThreads, 1) Attend8Sm90(const __grid_constant__ Attend8Params p) {
  extern __shared__ uint8_t raw[];
  auto& sm = *reinterpret_cast<SharedMemory8<SHAPE>*>(AlignedShared(raw));
  // Set up barriers.
  if (threadIdx.x == 0) {
    constexpr int kMathWarps = kMathThreads / 32;
    BarrierInit(&sm.work_full, 32);
    BarrierInit(&sm.work_empty, ImageProducer<SHAPE>::kLoaders * 32);
    BarrierInit(&sm.q_full[0], 1);
    BarrierInit(&sm.q_empty[0], kMathThreads);
    for (int i = 0; i < SHAPE::kStages; ++i) {
      BarrierInit(&sm.k_full[i], 1);
      BarrierInit(&sm.v_full[i], 1);
      BarrierInit(&sm.k_empty[i], kMathWarps);
      BarrierInit(&sm.v_empty[i], kMathWarps);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  GridWait(); // the images
  // Split up: one warpgroup loads, two compute.
  if (threadIdx.x < 128) {
    ShrinkRegisters<SHAPE::kProducerRegisters>();
    if (threadIdx.x < ImageProducer<SHAPE>::kThreads) ImageProducer<SHAPE>(p, sm).Run();
  } else {
    GrowRegisters<SHAPE::kMathRegisters>();
    Attend8Math<T, SHAPE>(p, sm).Run();
    BulkStoresDone();
  }
}

// The content of an instantiation file.
#define FLASHPREFILL_INSTANTIATE_ATTEND_8BIT(T)                                                                   \
  template <>                                                                                                     \
  Attend8KernelSet Attend8KernelOf<T>() {                                                                         \
    return {Attend8Sm90<T, Attend8Shape>, static_cast<int>(sizeof(SharedMemory8<Attend8Shape>)) + kOperandAlign}; \
  }

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_8BIT_KERNEL_CUH_
