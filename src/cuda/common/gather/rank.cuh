// How much each key holds of the softmax of segments' mean queries: two launches, each of which makes the product of
// all mean queries with every key before them (rank_product.cuh), because writing scores would cost more than making
// them twice.
//
// First launch: the denominators of each mean query, over the keys that its segment's last row sees. A thread adds up
// exponentials against any reference that keeps the sum in range; where it gets too large the step is done again with
// a new one, and without scores that are not finite. With 32 mean queries per thread, and their references in shared
// memory, it was 404 instructions for 64 scores, and 1.17 ms at 128K tokens.
//
// Second launch: shares, their squares added up over the heads of a list, and the code of the energy (args.h), 16 bits
// for each key and list. No barrier is between scores and codes, which leave as 32 bytes per thread and list. Whether
// all shares are numbers is asked of the sum of a step's squares: if one is not, the warp does it again, share by
// share.
//
// Every sum has one order, whatever else runs: no atomics.
#ifndef FLASHPREFILL_CUDA_COMMON_GATHER_RANK_CUH_
#define FLASHPREFILL_CUDA_COMMON_GATHER_RANK_CUH_

#include <limits>
#include <type_traits>

#include "cuda/common/gather/rank_product.cuh"

namespace flashprefill::cuda {
namespace {

constexpr float kNoReference = -1e30f; // of a mean query that has seen no key: any score is too large against it

// ---------------------------------------------------------------- sums

// The four lanes that share a mean query have one reference, and each the sum over its own keys.
class RankSums {
 public:
  __device__ __forceinline__ RankSums(const RankArgs& args, const RankUnit& unit, const int (&limit)[kRankColumns])
      : scale_(args.shape.exponent_scale), unit_(unit), limit_(limit) {}

  // A step's keys of a part.
  __device__ __forceinline__ void operator()(float (&d)[kRankStep / 2], int part, int step) {
    const int begin = unit_.begin + step * kRankStep;
    if (begin + kRankStep > unit_.whole) { // the last few thousand keys of a slot
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int left = limit_[RankRow(part, half)] - begin - kRankKeys * static_cast<int>(threadIdx.x % 4);
#pragma unroll
        for (int i = 0; i < kRankKeys; ++i) {
          if (i >= left) d[i / 2 * 4 + 2 * half + i % 2] = -INFINITY;
        }
      }
    }
    // Against the references, as far as that goes.
    float x[2][2] = {};
#pragma unroll
    for (int c = 0; c < kRankStep / 8; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i / 2][i % 2] += Exp2(fmaf(d[4 * c + i], scale_, -reference_[part][i / 2]));
    }
    const float add[2] = {x[0][0] + x[0][1], x[1][0] + x[1][1]};
    if (__all_sync(~0u, add[0] < kLargeSum && add[1] < kLargeSum)) {
      sum_[part][0] += add[0];
      sum_[part][1] += add[1];
    } else {
      AddAgain(d, part);
    }
  }

  // Logarithms of the sums.
  __device__ __forceinline__ void Store(float* to) const {
#pragma unroll
    for (int part = 0; part < kRankParts; ++part) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = sum_[part][half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const float reference = reference_[part][half];
        if (threadIdx.x % 4 == 0) {
          to[RankRow(part, half)] = reference == kNoReference ? -INFINITY : reference + log2f(total);
        }
      }
    }
  }

 private:
  // With new references, and without what is no number.
  __device__ __forceinline__ void AddAgain(const float (&d)[kRankStep / 2], int part) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float old = reference_[part][half];
      const auto score = [&](int i) {
        const float z = d[i / 2 * 4 + 2 * half + i % 2] * scale_;
        return IsFinite(z) ? z : -INFINITY;
      };
      float largest = old;
#pragma unroll
      for (int i = 0; i < kRankStep / 4; ++i) largest = fmaxf(largest, score(i));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      float sum = sum_[part][half] * Exp2(old - largest);
#pragma unroll
      for (int i = 0; i < kRankStep / 4; ++i) sum += Exp2(score(i) - largest);
      sum_[part][half] = sum;
      reference_[part][half] = largest;
    }
  }

  const float scale_;
  const RankUnit& unit_;
  const int (&limit_)[kRankColumns];
  float sum_[kRankParts][2] = {};
  float reference_[kRankParts][2] = {{kNoReference, kNoReference}, {kNoReference, kNoReference}};
};

template <class PRODUCT, typename T, int PANELS>
__global__ void __launch_bounds__(kPanelThreads, kRankCtas<PRODUCT, PANELS>)
    RankSumsKernel(const __grid_constant__ RankArgs args) {
  extern __shared__ char raw[];
  __shared__ int limit[kRankColumns];
  RankUnit unit;
  if (!PlaceRankUnit(args, false, limit, unit)) return;
  RankProduct<PRODUCT, T, PANELS> product(args, unit, AlignedRankPanels<PRODUCT>(raw));
  RankSums sums(args, unit, limit);
  product.Wait();
  product.ForEachPart(sums);
  const RankShape& a = args.shape;
  sums.Store(args.lse + (int64_t{unit.slot.slot} * a.chunks + a.by_chunks(unit.begin)) * kRankColumns);
}

// ---------------------------------------------------------------- codes

// Where the softmax of column j is measured from: of all chunks together. A column that is not there, or has no finite
// score, gets +inf: its shares are 0.
__device__ inline float RankDenominator(const RankArgs& args, const RankUnit& unit, int j, int limit) {
  const RankShape& a = args.shape;
  const int chunks = a.by_chunks(limit + a.chunk - 1);
  const float* const lse = args.lse + int64_t{unit.slot.slot} * a.chunks * kRankColumns + j;
  float largest = -INFINITY, total = 0;
#pragma unroll 8
  for (int i = 0; i < chunks; ++i) largest = fmaxf(largest, lse[i * kRankColumns]);
  if (largest == -INFINITY) return INFINITY;
#pragma unroll 8
  for (int i = 0; i < chunks; ++i) total += Exp2(lse[i * kRankColumns] - largest);
  return largest + log2f(total);
}

// COLUMNS: the shape's; 4: or more.
template <int COLUMNS>
class RankCodes {
 public:
  __device__ __forceinline__ RankCodes(const RankArgs& args, const RankUnit& unit,
                                       const float (&denominator)[kRankColumns])
      : shape_(args.shape),
        lists_(unit.slot.lists),
        stride_(args.code_stride),
        out_(args.codes + (int64_t{unit.slot.slot - args.first_slot} << args.shape.log2_lists) * args.code_stride +
             unit.begin + kRankKeys * (threadIdx.x % 4)) {
#pragma unroll
    for (int part = 0; part < kRankParts; ++part) {
#pragma unroll
      for (int half = 0; half < 2; ++half) denominator_[part][half] = denominator[RankRow(part, half)];
    }
  }

  // A step's keys of a part; part 0 first.
  __device__ __forceinline__ void operator()(const float (&d)[kRankStep / 2], int part, int step) {
    if constexpr (COLUMNS == 1) {
      Clear();
      Add<0, 1>(d, part);
      Store(2 * part, step);
      Clear();
      Add<1, 2>(d, part);
      Store(2 * part + 1, step);
    } else {
      if (COLUMNS == 2 || part == 0) Clear();
      Add<0, 2>(d, part);
      if (COLUMNS > 2 && part == 0) return;
      if (COLUMNS > 2) Join();
      Store(COLUMNS == 2 ? 2 * part : 0, step);
    }
  }

 private:
  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < kRankKeys; ++i) squares_[i] = 0;
  }

  // Squares of the shares of one or both of the thread's mean queries.
  template <int BEGIN, int END>
  __device__ __forceinline__ void Add(const float (&d)[kRankStep / 2], int part) {
    float sum[kRankKeys], total;
    const auto add = [&](auto careful) {
      total = 0;
#pragma unroll
      for (int i = 0; i < kRankKeys; ++i) {
        sum[i] = squares_[i];
#pragma unroll
        for (int half = BEGIN; half < END; ++half) {
          const float score = d[i / 2 * 4 + 2 * half + i % 2];
          float share = Exp2(fmaf(score, shape_.exponent_scale, -denominator_[part][half]));
          if (careful && !(share < 2.f)) share = 0; // counts for nothing
          sum[i] = fmaf(share, share, sum[i]);
        }
        total += sum[i];
      }
    };
    // A mean query's shares sum up to 1, but for keys that its segment does not rank.
    add(std::false_type{});
    if (!__all_sync(~0u, total < 8.f)) add(std::true_type{});
#pragma unroll
    for (int i = 0; i < kRankKeys; ++i) squares_[i] = sum[i];
  }

  // Over the threads, and from 64 columns on the warps, that share a list. Each of these gets the sums.
  __device__ __forceinline__ void Join() {
    const int columns = shape_.columns;
#pragma unroll
    for (int bit = 4; bit < 32; bit *= 2) {
      if (bit >= columns) return;
#pragma unroll
      for (int i = 0; i < kRankKeys; ++i) squares_[i] += __shfl_xor_sync(~0u, squares_[i], bit);
    }
    if (columns == 32) return;
    __shared__ float of_warp[kRankWarps][kRankStep];
    const int thread = threadIdx.x, warp = thread / 32, others = columns / 32, first = warp / others * others;
    const int key = kRankKeys * (thread % 4);
    __syncthreads(); // the sums of the step before have been read
    if (thread % 32 < 4) {
#pragma unroll
      for (int i = 0; i < kRankKeys; ++i) of_warp[warp][key + i] = squares_[i];
    }
    __syncthreads();
    Clear();
    for (int w = first; w < first + others; ++w) {
#pragma unroll
      for (int i = 0; i < kRankKeys; ++i) squares_[i] += of_warp[w][key + i];
    }
  }

  // Codes of the thread's keys: 32 bytes, by the first of the threads that share a list. mine: which of its lists.
  __device__ __forceinline__ void Store(int mine, int step) const {
    const int x = static_cast<int>(threadIdx.x & ~3u) | mine, list = x >> shape_.log2_columns;
    if ((x & ~3 & (shape_.columns - 1)) != 0 || list >= lists_) return;
    uint32_t codes[kRankKeys / 2];
#pragma unroll
    for (int i = 0; i < kRankKeys / 2; ++i) {
      codes[i] = __byte_perm(CodeOf(squares_[2 * i]), CodeOf(squares_[2 * i + 1]), 0x5410);
    }
    auto* const to = reinterpret_cast<uint4*>(out_ + list * stride_ + step * kRankStep);
    to[0] = make_uint4(codes[0], codes[1], codes[2], codes[3]);
    to[1] = make_uint4(codes[4], codes[5], codes[6], codes[7]);
  }

  const RankShape& shape_;
  const int lists_;
  const int64_t stride_;
  uint16_t* const out_; // of list 0 of the slot
  float denominator_[kRankParts][2];
  float squares_[kRankKeys]; // of shares, of the thread's keys of a step
};

template <class PRODUCT, typename T, int PANELS, int COLUMNS>
__global__ void __launch_bounds__(kPanelThreads, kRankCtas<PRODUCT, PANELS>)
    RankCodesKernel(const __grid_constant__ RankArgs args) {
  extern __shared__ char raw[];
  __shared__ float denominator[kRankColumns];
  __shared__ int limit[kRankColumns];
  RankUnit unit;
  if (!PlaceRankUnit(args, true, limit, unit)) return;
  RankProduct<PRODUCT, T, PANELS> product(args, unit, AlignedRankPanels<PRODUCT>(raw));
  const int j = threadIdx.x;
  denominator[j] = RankDenominator(args, unit, j, limit[j]);
  product.Wait();
  RankCodes<COLUMNS> codes(args, unit, denominator);
  product.ForEachPart(codes);
}

template <class PRODUCT, typename T, int PANELS>
cudaError_t LaunchRank(const RankArgs& args, bool sums, cudaStream_t stream) {
  const RankShape& a = args.shape;
  const int64_t grid = int64_t{args.end_slot - args.first_slot} * DivUp<int64_t>(a.d.p.max_seqlen_k, args.chunk);
  if (grid == 0) return cudaSuccess;
  if (grid > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const auto kernel = sums             ? RankSumsKernel<PRODUCT, T, PANELS>
                      : a.columns == 1 ? RankCodesKernel<PRODUCT, T, PANELS, 1>
                      : a.columns == 2 ? RankCodesKernel<PRODUCT, T, PANELS, 2>
                                       : RankCodesKernel<PRODUCT, T, PANELS, 4>;
  constexpr int bytes = RankProduct<PRODUCT, T, PANELS>::kBytes + kRankAlign<PRODUCT>;
  if (cudaError_t e = AllowSharedOnly(kernel, bytes)) return e;
  kernel<<<static_cast<unsigned>(grid), kPanelThreads, bytes, stream>>>(args);
  return cudaGetLastError();
}

template <class PRODUCT, typename T>
cudaError_t LaunchRankPanels(const RankArgs& args, bool sums, cudaStream_t stream) {
  const int head_dim = args.shape.d.p.head_dim;
  return head_dim <= 64    ? LaunchRank<PRODUCT, T, 1>(args, sums, stream)
         : head_dim <= 128 ? LaunchRank<PRODUCT, T, 2>(args, sums, stream)
                           : LaunchRank<PRODUCT, T, 4>(args, sums, stream);
}

template <class PRODUCT>
cudaError_t LaunchRankWith(const RankArgs& args, bool sums, cudaStream_t stream) {
  return args.shape.d.p.q.dtype == FP_BF16 ? LaunchRankPanels<PRODUCT, __nv_bfloat16>(args, sums, stream)
                                           : LaunchRankPanels<PRODUCT, __half>(args, sums, stream);
}

} // namespace
} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_GATHER_RANK_CUH_
