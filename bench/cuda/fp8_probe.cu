// What an 8-bit attention kernel on Hopper depends on, and no manual says. Three probes, a few seconds in all:
//
//     nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -o fp8_probe bench/cuda/fp8_probe.cu && ./fp8_probe
//
// 1. Conversions. How many values an SM rounds to e4m3 per clock, beside bf16, beside exp2, and with exp2 in one loop.
//    A step of attention converts as many weights as it takes exponentials. If e4m3 goes through the same unit as exp2
//    (the third figure is the sum of the times of the first two), P in e4m3 costs a quarter of the step, and one
//    exponential in eight should be a polynomial; if it does not, both are free beside the products.
// 2. The accumulator of FP8 products. How far below the largest term a term still counts, inside one instruction of 32
//    terms and from one to the next, and whether what is lost is rounded or cut. That decides how often a step must add
//    its products to fp32 registers: with b bits, sums over n equal weights are off by n / 2^b of themselves, at most.
//    13 bits ask for it every 4 steps of 128 keys on prompts of 128K; 22 or more would never.
// 3. int8 scores as floats. Accumulators that begin at the bits of 1.5 * 2^23 are those of 1.5 * 2^23 + the sum, so
//    no score needs a conversion. Whether the hardware adds to such a beginning, for sums of either sign, and what the
//    64 moves cost beside converting 64 integers.
//
// A product's own operands are laid out as in shared memory without swizzle; the second probe begins with a product of
// small integers that is compared with the host's, so a wrong layout is told and not taken for a narrow accumulator.
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kM = 64, kN = 8, kK = 32; // one wgmma of 8-bit operands
constexpr int kWarpgroup = 128;

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// ---------------------------------------------------------------- 1. conversions

enum class Work { kE4M3, kBf16, kExp2, kBoth };
constexpr int kValues = 16, kRounds = 4096;

// Each thread works on kValues values, kRounds times. The results feed the next round, so nothing can be left out.
template <Work WORK>
__global__ void Convert(float* out, long long* clocks) {
  float x[kValues];
  for (int i = 0; i < kValues; ++i) x[i] = 0.001f * static_cast<float>(threadIdx.x + i);
  uint32_t sum = 0;
  const long long begin = clock64();
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int i = 0; i < kValues; i += 2) {
      if constexpr (WORK == Work::kE4M3 || WORK == Work::kBoth) {
        uint16_t two;
        asm volatile("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(x[i]), "f"(x[i + 1]));
        sum += two;
      }
      if constexpr (WORK == Work::kBf16) {
        uint32_t two;
        asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(x[i]), "f"(x[i + 1]));
        sum += two;
      }
      if constexpr (WORK == Work::kExp2 || WORK == Work::kBoth) {
        asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i]));
        asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i + 1]));
      }
    }
  }
  const long long end = clock64();
  float rest = static_cast<float>(sum);
  for (float value : x) rest += value;
  out[blockIdx.x * blockDim.x + threadIdx.x] = rest;
  if (threadIdx.x == 0) clocks[blockIdx.x] = end - begin;
}

template <Work WORK>
void ProbeConversion(const char* name) {
  constexpr int kThreads = 1024; // of one CTA on one SM: all four schedulers have work
  float* out;
  long long *clocks, host;
  Check(cudaMalloc(&out, kThreads * sizeof(float)), "memory");
  Check(cudaMalloc(&clocks, sizeof(long long)), "memory");
  for (int turn = 0; turn < 2; ++turn) Convert<WORK><<<1, kThreads>>>(out, clocks);
  Check(cudaMemcpy(&host, clocks, sizeof host, cudaMemcpyDeviceToHost), name);
  std::printf("  %-28s %6.1f values per clock and SM\n", name,
              static_cast<double>(kThreads) * kValues * kRounds / static_cast<double>(host));
  cudaFree(out), cudaFree(clocks);
}

// ---------------------------------------------------------------- products

// Operands K-major in core matrices of 8 rows x 16 bytes: those of neighbouring K are 128 bytes apart, of neighbouring
// rows 256.
__device__ int Offset(int row, int k) { return row / 8 * 256 + k / 16 * 128 + row % 8 * 16 + k % 16; }

__device__ uint64_t Descriptor(const void* shared) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  return (uint64_t{256 >> 4} << 32) | (uint64_t{128 >> 4} << 16) | ((address & 0x3ffff) >> 4);
}

#define FP_PROBE_PRODUCT(SUFFIX, CONSTRAINT, TAIL)                                                      \
  asm volatile("wgmma.fence.sync.aligned;\n\twgmma.mma_async.sync.aligned.m64n8k32." SUFFIX             \
               " {%0, %1, %2, %3}, %4, %5, 1" TAIL                                                      \
               ";\n\t"                                                                                  \
               "wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;"                   \
               : "+" CONSTRAINT(d[0]), "+" CONSTRAINT(d[1]), "+" CONSTRAINT(d[2]), "+" CONSTRAINT(d[3]) \
               : "l"(a), "l"(b)                                                                         \
               : "memory")
__device__ void Multiply(float (&d)[4], uint64_t a, uint64_t b) { FP_PROBE_PRODUCT("f32.e4m3.e4m3", "f", ", 1, 1"); }
__device__ void Multiply(int (&d)[4], uint64_t a, uint64_t b) { FP_PROBE_PRODUCT("s32.s8.s8", "r", ""); }
#undef FP_PROBE_PRODUCT

// d [kM][kN] = start + a [kM][kK] b[kN][kK]^T, `times` times; a changes to a2 after the first product.
template <typename T>
__global__ void Product(const uint8_t* a, const uint8_t* a2, const uint8_t* b, T start, int times, T* d) {
  __shared__ alignas(128) uint8_t first[kM * kK], others[kM * kK], right[kN * kK];
  for (int i = threadIdx.x; i < kM * kK; i += kWarpgroup) {
    first[Offset(i / kK, i % kK)] = a[i];
    others[Offset(i / kK, i % kK)] = a2[i];
    if (i < kN * kK) right[Offset(i / kK, i % kK)] = b[i];
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  T sums[4] = {start, start, start, start};
  for (int i = 0; i < times; ++i) Multiply(sums, Descriptor(i == 0 ? first : others), Descriptor(right));
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * kN + column + i % 2] = sums[i];
}

// Element [0][0] of such a product, whose b is all ones: the sum of a's first row.
template <typename T>
T SumOf(const std::vector<uint8_t>& row, const std::vector<uint8_t>& others, uint8_t one, T start, int times,
        std::vector<T>* whole = nullptr, const std::vector<uint8_t>* right = nullptr) {
  std::vector<uint8_t> a(kM * kK), a2(kM * kK), b(kN * kK, one);
  for (int i = 0; i < kM * kK; ++i) {
    a[i] = row[row.size() == kK ? i % kK : i];
    a2[i] = others[others.size() == kK ? i % kK : i];
  }
  if (right) b = *right;
  uint8_t *da, *da2, *db;
  T* dd;
  std::vector<T> d(kM * kN);
  Check(cudaMalloc(&da, a.size()), "memory"), Check(cudaMalloc(&da2, a2.size()), "memory");
  Check(cudaMalloc(&db, b.size()), "memory"), Check(cudaMalloc(&dd, d.size() * sizeof(T)), "memory");
  cudaMemcpy(da, a.data(), a.size(), cudaMemcpyHostToDevice);
  cudaMemcpy(da2, a2.data(), a2.size(), cudaMemcpyHostToDevice);
  cudaMemcpy(db, b.data(), b.size(), cudaMemcpyHostToDevice);
  Product<<<1, kWarpgroup>>>(da, da2, db, start, times, dd);
  Check(cudaMemcpy(d.data(), dd, d.size() * sizeof(T), cudaMemcpyDeviceToHost), "the product");
  cudaFree(da), cudaFree(da2), cudaFree(db), cudaFree(dd);
  if (whole) *whole = d;
  return d[0];
}

uint8_t E4M3(float x) { return __nv_fp8_e4m3(x).__x; }

// ---------------------------------------------------------------- 2. the accumulator

// Products of small integers, different ones in each row and column, against the host's.
void CheckLayout() {
  std::vector<uint8_t> a(kM * kK), b(kN * kK);
  std::vector<int> ia(kM * kK), ib(kN * kK);
  for (int i = 0; i < kM * kK; ++i) a[i] = E4M3(static_cast<float>(ia[i] = (i * 7 + i / kK) % 5 - 2));
  for (int i = 0; i < kN * kK; ++i) b[i] = E4M3(static_cast<float>(ib[i] = (i * 3 + i / kK) % 7 - 3));
  std::vector<float> d;
  SumOf<float>(a, a, 0, 0.0f, 1, &d, &b);
  for (int i = 0; i < kM * kN; ++i) {
    int sum = 0;
    for (int k = 0; k < kK; ++k) sum += ia[i / kN * kK + k] * ib[i % kN * kK + k];
    if (d[i] == static_cast<float>(sum)) continue;
    std::fprintf(stderr, "the layout of the operands is wrong: element %d is %g and must be %d\n", i, d[i], sum);
    std::exit(1);
  }
}

void ProbeAccumulator() {
  CheckLayout();
  const uint8_t one = E4M3(1), zero = E4M3(0);
  const std::vector<uint8_t> nothing(kK, zero);
  // One term of 1 beside a beginning of 2^b: from which b on it is lost. Then of 1.5 and 1.75, to tell rounding.
  const auto survives = [&](float start, float term) {
    std::vector<uint8_t> row(kK, zero);
    row[5] = E4M3(term);
    return SumOf<float>(row, nothing, one, start, 1) - start;
  };
  int bits = 0;
  while (bits < 30 && survives(std::ldexp(1.0f, bits), 1) == 1) ++bits;
  std::printf("  from one product to the next, a term counts down to 2^-%d of the sum\n", bits - 1);
  const float big = std::ldexp(1.0f, bits);
  std::printf("  half a step further: 1 becomes %g, 1.5 becomes %g, 1.75 becomes %g of the sum 2^%d\n",
              survives(big, 1), survives(big, 1.5), survives(big, 1.75), bits);
  std::printf("  and below zero: -1 becomes %g, -1.75 becomes %g\n", survives(big, -1), survives(big, -1.75));
  // Inside one instruction: 2^8 (as 256 * 1) beside terms of 2^-e.
  int inside = 0;
  for (; inside <= 9 + 8; ++inside) {
    std::vector<uint8_t> row(kK, zero);
    row[0] = E4M3(256), row[17] = E4M3(std::ldexp(1.0f, 8 - inside));
    if (SumOf<float>(row, nothing, one, 0.0f, 1) != 256 + std::ldexp(1.0f, 8 - inside)) break;
  }
  std::printf("  inside one product, a term counts down to 2^-%d of the largest%s\n", inside - 1,
              inside > 17 ? " at least" : "");
  // What it is about: the sum of n equal weights of 7/16, as a flat row of attention has them.
  for (const int products : {128, 1024, 4096}) {
    const std::vector<uint8_t> flat(kK, E4M3(0.4375f));
    const double exact = 0.4375 * kK * products, sum = SumOf<float>(flat, flat, one, 0.0f, products);
    std::printf("  %6d equal weights: relative error %.2e\n", kK * products, (sum - exact) / exact);
  }
}

// ---------------------------------------------------------------- 3. scores as floats

void ProbeScores() {
  const int magic = 0x4b400000; // 1.5 * 2^23
  int wrong = 0, worst = 0;
  for (int i = -64; i <= 64; ++i) {
    std::vector<uint8_t> row(kK), others(kK);
    int sum = 0;
    for (int k = 0; k < kK; ++k) {
      const int x = i == -64 ? -127 : i == 64 ? 127 : (i * (k + 1)) % 128;
      row[k] = others[k] = static_cast<uint8_t>(static_cast<int8_t>(x));
      sum += x;
    }
    for (const int8_t factor : {int8_t{127}, int8_t{-127}}) {
      const int bits = SumOf<int>(row, others, static_cast<uint8_t>(factor), magic, 4); // head_dim 128
      float score;
      static_assert(sizeof score == sizeof bits);
      __builtin_memcpy(&score, &bits, sizeof score);
      const int read = static_cast<int>(score - 12582912.0f), expected = 4 * factor * sum;
      wrong += read != expected;
      worst = std::max(worst, std::abs(expected));
    }
  }
  std::printf("  %d of 258 sums of 128 terms differ; the largest is %d, and 2^22 is %d\n", wrong, worst, 1 << 22);
}

// The two ways to a float, on 64 accumulators per thread: each begins anew, gets its sum and is scaled.
template <bool AS_FLOAT>
__global__ void Read(const int* from, float* out, long long* clocks) {
  constexpr int kScores = 64;
  int sums[kScores];
  float total = 0;
  const long long begin = clock64();
  for (int round = 0; round < 256; ++round) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      asm volatile("mov.b32 %0, %1;" : "=r"(sums[i]) : "r"(AS_FLOAT ? 0x4b400000 : 0));
      sums[i] += from[round & 1]; // stands for the product
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const float score = AS_FLOAT ? __int_as_float(sums[i]) : static_cast<float>(sums[i]);
      total = fmaf(score, 0.01f, total);
    }
  }
  out[threadIdx.x] = total;
  if (threadIdx.x == 0) *clocks = clock64() - begin;
}

template <bool AS_FLOAT>
void ProbeRead(const char* name) {
  int* from;
  float* out;
  long long *clocks, host;
  Check(cudaMalloc(&from, 2 * sizeof(int)), "memory"), Check(cudaMemset(from, 0, 2 * sizeof(int)), "memory");
  Check(cudaMalloc(&out, 256 * sizeof(float)), "memory"), Check(cudaMalloc(&clocks, sizeof(long long)), "memory");
  for (int turn = 0; turn < 2; ++turn) Read<AS_FLOAT><<<1, 256>>>(from, out, clocks);
  Check(cudaMemcpy(&host, clocks, sizeof host, cudaMemcpyDeviceToHost), name);
  std::printf("  %-28s %6.1f clocks for 64 scores of 8 warps\n", name, static_cast<double>(host) / 256);
  cudaFree(from), cudaFree(out), cudaFree(clocks);
}

} // namespace

int main() {
  cudaDeviceProp device;
  Check(cudaGetDeviceProperties(&device, 0), "the device");
  std::printf("%s\n\nconversions\n", device.name);
  if (device.major != 9) {
    std::fprintf(stderr, "needs Hopper: wgmma is there only\n");
    return 1;
  }
  ProbeConversion<Work::kE4M3>("to e4m3");
  ProbeConversion<Work::kBf16>("to bf16");
  ProbeConversion<Work::kExp2>("exp2");
  ProbeConversion<Work::kBoth>("exp2, and its values to e4m3");
  std::printf("\nthe accumulator of e4m3 products\n");
  ProbeAccumulator();
  std::printf("\nint8 scores read as floats\n");
  ProbeScores();
  ProbeRead<true>("read as floats");
  ProbeRead<false>("converted");
}
