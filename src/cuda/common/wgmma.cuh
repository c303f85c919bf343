// The warpgroup matrix product, wgmma: D (64 x N, fp32 in registers) = A (64 x 16) B (16 x N) + D, N = 32, 64, 128 or
// 256, for bf16 and fp16. Operands in shared memory lie in panels of 64 columns (128 bytes per row, 128-byte swizzle,
// 1024-byte aligned), as bulk tensor copies with boxes of 64 columns leave them. In such a panel 8 rows are 1024 bytes.
//
// Registers: lane l of warp w of the warpgroup holds of D, for each 8 columns c, the values
// d[4c], d[4c+1] of row 16w + l/4 and d[4c+2], d[4c+3] of row 16w + l/4 + 8, columns 8c + 2 (l%4) and the next. Packed
// to 16 bits, d[8k .. 8k+7] are the four registers of A's k-th 64 x 16 slice: softmax feeds P V without a shuffle.
#ifndef FLASHPREFILL_CUDA_COMMON_WGMMA_CUH_
#define FLASHPREFILL_CUDA_COMMON_WGMMA_CUH_

#include "cuda/common/ptx.cuh"

namespace flashprefill::cuda {

constexpr int kOperandAlign = 1024;

// Dynamic shared memory from the next multiple of kOperandAlign on: ask for as much more.
template <typename Byte>
__device__ __forceinline__ Byte* AlignedShared(Byte* raw) {
  return raw + (kOperandAlign - SharedAddress(raw) % kOperandAlign) % kOperandAlign;
}

// Descriptors count in units of 16 bytes from bit 0 on, so a byte offset is added as offset / 16.

// Shared-memory operand whose rows are its M (or N) index and whose columns are summed over: Q, and K in Q K^T. The
// next 16 columns are 32 bytes on.
__device__ __forceinline__ uint64_t DescribeKMajor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 16) | ((address & 0x3ffff) >> 4);
}

// Shared-memory operand B whose rows are summed over and whose columns are its N index: V in P V. The panels are
// `panel_bytes` apart; the next 16 rows are 2048 bytes on.
__device__ __forceinline__ uint64_t DescribeNMajor(uint32_t address, uint32_t panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | (uint64_t{1024 >> 4} << 32) | (uint64_t{panel_bytes >> 4} << 16) | ((address & 0x3ffff) >> 4);
}

// Before the first product of a batch, and after registers that it uses were written.
__device__ __forceinline__ void WgmmaFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void WgmmaCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING committed groups are unfinished.
template <int PENDING>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving uses of these registers across this point.
template <int COUNT>
__device__ __forceinline__ void KeepInPlace(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int COUNT>
__device__ __forceinline__ void KeepInPlace(int32_t (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

#define FP_NAMES_N32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FP_NAMES_0 FP_NAMES_N32 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FP_NAMES_1                                                                   \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FP_NAMES_2                                                                   \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FP_NAMES_3                                                                               \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FP_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FP_D16(i) FP_D4(i), FP_D4(i + 4), FP_D4(i + 8), FP_D4(i + 12)
#define FP_D64(i) FP_D16(i), FP_D16(i + 16), FP_D16(i + 32), FP_D16(i + 48)
#define FP_R4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define FP_R16(i) FP_R4(i), FP_R4(i + 4), FP_R4(i + 8), FP_R4(i + 12)
#define FP_NAMES_N64 FP_NAMES_0
#define FP_NAMES_N128 FP_NAMES_0 ", " FP_NAMES_1
#define FP_NAMES_N256 FP_NAMES_0 ", " FP_NAMES_1 ", " FP_NAMES_2 ", " FP_NAMES_3
#define FP_REGISTERS_N32 FP_D16(0)
#define FP_REGISTERS_N64 FP_D16(0), FP_D16(16)
#define FP_REGISTERS_N128 FP_D64(0)
#define FP_REGISTERS_N256 FP_D64(0), FP_D64(64)

// The operands that follow the N/2 registers of D are numbered from there: A0 .. A5 below.
#define FP_PRODUCT_SS(N, TYPE, A0, A1, A2)                                                        \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #A2                                       \
               ", 0;\n\t"                                                                         \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FP_NAMES_N##N \
               "}, %" #A0 ", %" #A1 ", p, 1, 1, 0, 0;\n\t}"                                       \
               : FP_REGISTERS_N##N                                                                \
               : "l"(a), "l"(b), "r"(accumulate))
#define FP_PRODUCT_RS(N, TYPE, A0, A1, A2, A3, A4, A5)                                            \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #A5                                       \
               ", 0;\n\t"                                                                         \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FP_NAMES_N##N \
               "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #A4 ", p, 1, 1, 1;\n\t}"          \
               : FP_REGISTERS_N##N                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
#define FP_DEFINE_PRODUCTS(N, TYPE, D0, D1, D2, D3, D4, D5)                                                    \
  static __device__ __forceinline__ void SS(float(&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {        \
    FP_PRODUCT_SS(N, TYPE, D0, D1, D2);                                                                        \
  }                                                                                                            \
  static __device__ __forceinline__ void RS(float(&d)[N / 2], const uint32_t* a, uint64_t b, int accumulate) { \
    FP_PRODUCT_RS(N, TYPE, D0, D1, D2, D3, D4, D5);                                                            \
  }

// SS: A and B from shared memory, both K-major. RS: A from four registers per lane, B N-major. accumulate = 0: D's old
// value is not read.
template <typename T>
struct Wgmma;

template <>
struct Wgmma<__nv_bfloat16> {
  FP_DEFINE_PRODUCTS(32, "bf16", 16, 17, 18, 19, 20, 21)
  FP_DEFINE_PRODUCTS(64, "bf16", 32, 33, 34, 35, 36, 37)
  FP_DEFINE_PRODUCTS(128, "bf16", 64, 65, 66, 67, 68, 69)
  FP_DEFINE_PRODUCTS(256, "bf16", 128, 129, 130, 131, 132, 133)
};

template <>
struct Wgmma<__half> {
  FP_DEFINE_PRODUCTS(32, "f16", 16, 17, 18, 19, 20, 21)
  FP_DEFINE_PRODUCTS(64, "f16", 32, 33, 34, 35, 36, 37)
  FP_DEFINE_PRODUCTS(128, "f16", 64, 65, 66, 67, 68, 69)
  FP_DEFINE_PRODUCTS(256, "f16", 128, 129, 130, 131, 132, 133)
};

// 8 bits per value: D (64 x 128) = A (64 x 32) B (32 x 128) + D. Both operands are K-major, whatever they come from: a
// panel row holds 128 values, and the next 32 of them are 32 bytes on. Of A in registers lane l has four values each of
// rows l/4, l/4 + 8, and of both again 16 columns further, from column 4 (l%4) on.

// int8, sums of integers.
struct WgmmaInt8 {
  static __device__ __forceinline__ void SS(int32_t (&d)[64], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" FP_NAMES_N128 "}, %64, %65, p;\n\t}"
        : FP_R16(0), FP_R16(16), FP_R16(32), FP_R16(48)
        : "l"(a), "l"(b), "r"(accumulate));
  }
};

// e4m3. The sums have some 14 bits on Hopper, so that long ones belong into fp32 registers of one's own.
struct WgmmaE4M3 {
  static __device__ __forceinline__ void RS(float (&d)[64], const uint32_t* a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %69, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" FP_NAMES_N128
        "}, {%64, %65, %66, %67}, %68, p, 1, 1;\n\t}"
        : FP_D64(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }
};

#undef FP_R4
#undef FP_R16
#undef FP_NAMES_0
#undef FP_NAMES_1
#undef FP_NAMES_2
#undef FP_NAMES_3
#undef FP_D4
#undef FP_D16
#undef FP_D64
#undef FP_NAMES_N32
#undef FP_NAMES_N64
#undef FP_NAMES_N128
#undef FP_NAMES_N256
#undef FP_REGISTERS_N32
#undef FP_REGISTERS_N64
#undef FP_REGISTERS_N128
#undef FP_REGISTERS_N256
#undef FP_PRODUCT_SS
#undef FP_PRODUCT_RS
#undef FP_DEFINE_PRODUCTS

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_WGMMA_CUH_
