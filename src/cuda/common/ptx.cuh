// Hopper's instructions that C++ has no name for, each wrapped once: mbarriers, bulk tensor copies, asynchronous
// copies, named barriers, register hand-over, stmatrix. Nothing here knows what it is used for.
#ifndef FLASHPREFILL_CUDA_COMMON_PTX_CUH_
#define FLASHPREFILL_CUDA_COMMON_PTX_CUH_

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flashprefill::cuda {

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---------------------------------------------------------------- mbarriers

__device__ __forceinline__ void BarrierInit(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void BarrierArrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}

// Arrives, and makes the phase wait for that many bytes of bulk copies too.
__device__ __forceinline__ void BarrierArriveExpect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(bytes)
               : "memory");
}

// Arrives once all asynchronous copies that this thread has started are done; counts as one of the init's arrivals.
__device__ __forceinline__ void BarrierArriveAfterCopies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}

__device__ __forceinline__ void BarrierWait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(SharedAddress(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// ---------------------------------------------------------------- copies

__device__ __forceinline__ void PrefetchTensorMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Four-dimensional box from global to shared memory; coordinates innermost first. Outside the tensor there are zeros.
__device__ __forceinline__ void BulkLoad(void* to, const CUtensorMap* map, uint64_t* barrier, int x0, int x1, int x2,
                                         int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(SharedAddress(to)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}

// Bytes that lie together; their number and both addresses are multiples of 16.
__device__ __forceinline__ void BulkLoadBytes(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   SharedAddress(to)),
               "l"(from), "r"(bytes), "r"(SharedAddress(barrier))
               : "memory");
}

// The other way: nothing is written outside the tensor. The thread that commits is the one that waits.
__device__ __forceinline__ void BulkStore(const CUtensorMap* map, uint32_t from, int x0, int x1, int x2, int x3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(from), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
               : "memory");
}
__device__ __forceinline__ void BulkStoresCommit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until shared memory has been read, or until everything has been written.
__device__ __forceinline__ void BulkStoresRead() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void BulkStoresDone() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// pointer + 16 * units bytes, in one instruction.
__device__ __forceinline__ const void* AddUnits16(const void* pointer, uint32_t units) {
  uint64_t sum;
  asm("mad.wide.u32 %0, %1, 16, %2;" : "=l"(sum) : "r"(units), "l"(pointer));
  return reinterpret_cast<const void*>(sum);
}

// 16 bytes, or zeros if `valid` is false (the address is not read then).
__device__ __forceinline__ void AsyncCopy16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

// `bytes` of the 16, from 0 on, and zeros for the others.
__device__ __forceinline__ void AsyncCopyPart16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void AsyncCopyWaitAll() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Orders this thread's ordinary shared-memory accesses before later ones of the matrix units and the copy engine.
__device__ __forceinline__ void FenceAsyncProxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---------------------------------------------------------------- warpgroups

template <int REGISTERS>
__device__ __forceinline__ void GrowRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void ShrinkRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ __forceinline__ void NamedBarrierSync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void NamedBarrierArrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// threadIdx.x, read again at this point: values made from it need not stay in registers until then.
__device__ __forceinline__ int ThreadAgain() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// True for one lane of a converged warp; the compiler knows that it is one.
__device__ __forceinline__ bool ElectOne() {
  uint32_t elected;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "elect.sync _|p, 0xffffffff;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(elected));
  return elected != 0;
}

// ---------------------------------------------------------------- values

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Keeps the arithmetic that makes a and b in front of this point. ptxas moves arithmetic behind waits for products that
// it doesn't depend on, out of their shadow (3 to 6 % at head_dim 256), but a store stays where it is, also one that
// never happens, because a is not `never`; only the compiler must not know that.
__device__ __forceinline__ void HoldBack(float a, float b, float never, float* nowhere) {
  if (a == never) asm volatile("st.shared.f32 [%0], %1;" ::"r"(SharedAddress(nowhere)), "f"(b) : "memory");
}

// Ends a block of code: ptxas orders instructions freely inside one, and hardly across its end. No thread takes the
// exit, because `zero` is 0; only the compiler must not know that. Of several with one condition the first one remains,
// but the order that the others asked for does too.
__device__ __forceinline__ void EndBlock(uint32_t zero) {
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %0, 0;\n\t@p exit;\n\t}" ::"r"(zero));
}

// A copy in another register, made where it stands. ptxas would merge a plain copy with its source, also where the
// matrix units still read the register that is copied to, and then serialise all products (C7513).
__device__ __forceinline__ uint32_t OpaqueCopy(uint32_t x, uint32_t zero) {
  uint32_t y;
  asm volatile("xor.b32 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(zero));
  return y;
}

// Two floats as two 16-bit values, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t Pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t Pack<__nv_bfloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ __forceinline__ uint32_t Pack<__half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Four 8x8 matrices of 16-bit values to shared memory; lane 8 i + r gives the address of row r of matrix i.
__device__ __forceinline__ void StoreMatrix4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

__device__ __forceinline__ void StoreShared8(uint32_t address, uint32_t low, uint32_t high) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(low), "r"(high) : "memory");
}

__device__ __forceinline__ float2 LoadShared8(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ uint4 LoadShared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_PTX_CUH_
