// The warp's matrix product of every GPU since Ampere, mma.sync, what feeds it (ldmatrix) and what fills shared memory
// (cp.async groups), each wrapped once. Rows of 16-bit values lie in panels of 64 columns, 128 bytes per row, 16-byte
// piece p of row r at p ^ (r & 7): eight rows of a piece fall on all banks, so ldmatrix reads without conflicts, with
// and without transposition, and wgmma could read the same panels.
//
// mma.sync takes A (16 x 16) and B (16 x 8) and adds to D (16 x 8): the layout of D is row_math.cuh's, and packed to 16
// bits two groups of columns of it are the next product's A.
#ifndef FLASHPREFILL_CUDA_SM80_MMA_CUH_
#define FLASHPREFILL_CUDA_SM80_MMA_CUH_

#include "cuda/common/ptx.cuh"

namespace flashprefill::cuda {

constexpr int kRowBytes = 128; // of a row in a panel

// d += A B.
template <typename T>
__device__ __forceinline__ void Mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void Mma<__nv_bfloat16>(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void Mma<__half>(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of 16-bit values; lane 8 i + r gives the address of row r of matrix i.
__device__ __forceinline__ void LoadMatrix4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void LoadMatrix4Transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Where a lane's rows of an operand begin in a panel whose address is a multiple of 128. Column slice k of 16 is at
// Piece(address, k) of panel k / 4: an exclusive or with a number that the compiler knows.
//
// A: rows first_row .. + 16; also B whose rows are summed over (V in P V), transposed.
__device__ __forceinline__ uint32_t RowsOfA(uint32_t panel, int first_row) {
  const uint32_t lane = threadIdx.x % 32;
  return panel + (first_row + lane % 16) * kRowBytes + (((lane >> 4) ^ (lane & 7)) << 4);
}
// B whose rows are its N index (K in Q K^T): 16 of them make two products' B, {r[0], r[1]} and {r[2], r[3]}.
__device__ __forceinline__ uint32_t RowsOfB(uint32_t panel, int first_row) {
  const uint32_t lane = threadIdx.x % 32;
  return panel + (first_row + (lane & 7) + (lane >> 4 << 3)) * kRowBytes + (((lane >> 3 & 1) ^ (lane & 7)) << 4);
}
__device__ __forceinline__ uint32_t Piece(uint32_t rows, int k) { return rows ^ (k % 4 * 32); }

__device__ __forceinline__ void AsyncCopyCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's groups are unfinished.
template <int PENDING>
__device__ __forceinline__ void AsyncCopyWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM80_MMA_CUH_
