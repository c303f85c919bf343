// Lists that S2O's rows stop, for Hopper. A list of one head has mostly 32 rows, so there is a product of 32 columns.
#include "cuda/common/gather/stop.cuh"
#include "cuda/sm90/panel_product.cuh"

namespace flashprefill::cuda {
namespace {

// D (64 x 32) = A B^T (+ D), 16 columns of both, as Wgmma::SS has it for more columns.
template <typename T>
__device__ __forceinline__ void Product32(float (&d)[16], uint64_t a, uint64_t b, int accumulate) {
#define FP_PRODUCT_32(TYPE)                                                                                         \
  asm volatile(                                                                                                     \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %18, 0;\n\t"                                                            \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE                                                   \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 0, 0;"           \
      "\n\t}"                                                                                                       \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])                    \
      : "l"(a), "l"(b), "r"(accumulate))
  if constexpr (std::is_same_v<T, __half>) {
    FP_PRODUCT_32("f16");
  } else {
    FP_PRODUCT_32("bf16");
  }
#undef FP_PRODUCT_32
}

struct StopProduct : PanelProductSm90 {
  template <typename T, int PANELS, int COLUMNS, typename Meanwhile>
  static __device__ __forceinline__ void Multiply(float (&d)[COLUMNS / 2], const char* a, const char* b,
                                                  Meanwhile&& meanwhile) {
    if constexpr (COLUMNS == 32) {
      const uint64_t left = DescribeKMajor(SharedAddress(a)), right = DescribeKMajor(SharedAddress(b));
      WgmmaFence();
#pragma unroll
      for (int slice = 0; slice < 4 * PANELS; ++slice) {
        Product32<T>(d, left + slice / 4 * (kProductRows * kPanelRowBytes / 16) + slice % 4 * 2,
                     right + slice / 4 * (COLUMNS * kPanelRowBytes / 16) + slice % 4 * 2, slice > 0);
      }
      WgmmaCommit();
      meanwhile();
      WgmmaWait<0>();
      KeepInPlace(d);
    } else {
      PanelProductSm90::Multiply<T, PANELS, COLUMNS>(d, a, b, meanwhile);
    }
  }
};

} // namespace

cudaError_t LaunchKeyStopSm90(const KeyStopArgs& args, cudaStream_t stream) {
  return LaunchStopWith<StopProduct>(args, stream);
}

int64_t KeyStopBytesSm90(int head_dim, int64_t rows, int64_t room) {
  return StopBytesOf<StopProduct>(head_dim, rows, room);
}

} // namespace flashprefill::cuda
