// How much each key holds of the softmax of segments' mean queries: two launches, each of which makes the product of
// all mean queries with every key before them, because writing scores would cost more than making them twice. A CTA is
// one warpgroup with 128 mean queries, those of a slot's lists, and one chunk of keys:
//
//     D[64 keys, 128 mean queries] = K[64, d] . Q[128, d]^T
//
// First launch: the denominators of each mean query, over the keys that its segment's last row sees. A thread adds up
// its own two keys per step for each of its columns and meets the others once a chunk, as the row sums of verticals and
// slashes do (vertical_slash/sums.cuh): against any reference that keeps the sum in range, and where it gets too large
// the step is done again with a new one, and without scores that are not finite.
//
// Second launch: shares, their squares added up over the heads of a list, and the code of the energy (args.h), 16 bits
// for each key and list. A thread of the product has two of every eight columns: a list's columns are put where one
// thread has them all, up to 32 of them, so that nothing is exchanged. Whether all shares are numbers is asked once per
// key and list, of the sum of their squares: if one is not, the warp does its step again, share by share. The number
// of columns is a template argument: asked at run time, and with logarithms for codes, this launch took 3.1 ms in place
// of 2.0 at 128K tokens. Codes leave through shared memory, 128 bytes per list and step.
//
// Every sum has one order, whatever else runs: no atomics.
#ifndef FLASHPREFILL_CUDA_COMMON_GATHER_RANK_CUH_
#define FLASHPREFILL_CUDA_COMMON_GATHER_RANK_CUH_

#include <limits>
#include <type_traits>

#include "cuda/common/gather/args.h"
#include "cuda/common/launch.h"
#include "cuda/common/numbers.cuh"
#include "cuda/common/swizzled_rows.cuh"

namespace flashprefill::cuda {
namespace {

constexpr int kRankWarps = kPanelThreads / 32;
// The portable product: 99 KiB must do, operands take registers on their way, and panels are multiples of a row.
template <class PRODUCT>
constexpr bool kRankPortable = PRODUCT::template kStages<4> == 1;
template <class PRODUCT>
constexpr int kRankAlign = kRankPortable<PRODUCT> ? kPanelRowBytes : kPanelAlign;
template <class PRODUCT, int PANELS>
constexpr int kRankCtas = PANELS == 4 || kRankPortable<PRODUCT> ? 2 : 4; // per multiprocessor
constexpr int kSumColumns = 4;                                           // of a thread, whose sums are checked together
constexpr float kNoReference = -1e30f;    // of a column that has seen no key: any score is too large against it
constexpr int kCodePitch = kRankStep + 8; // of a list's codes in shared memory: 16 bytes more, for the banks

template <class PRODUCT>
__device__ __forceinline__ char* AlignedRankPanels(char* raw) {
  constexpr uint32_t kAlign = kRankAlign<PRODUCT>;
  return raw + (kAlign - SharedAddress(raw) % kAlign) % kAlign;
}

// What column j = 8 c + 2 q + e of a product is, of which a thread has those of one q: a list's heads are its e, then
// c, and q only where there are more than 32.
struct RankColumn {
  int list, head; // of the slot, of the list

  __device__ static RankColumn At(const RankShape& a, int j) {
    if (a.log2_columns == 0) return {j, 0};
    const int c = j / 8, q = j / 2 % 4, e = j % 2;
    const int of_c = min(a.log2_columns - 1, 4), of_q = a.log2_columns - 1 - of_c; // bits
    return {((c >> of_c) * 4 + q) >> of_q, (q & ((1 << of_q) - 1)) * 32 + (c & ((1 << of_c) - 1)) * 2 + e};
  }
};

// The work of a CTA.
struct RankUnit {
  RankSlot slot;
  int begin, steps; // first key; times 64 keys
  int whole;        // keys below this are seen by all columns of ranked lists
};

// Fills in the unit, and in shared memory for each column how many keys it sees. The unit's keys are those that some
// ranked list's columns see, or with `only_ranked` those that such a list ranks; false if there are none. Columns that
// are not there, and those of lists that rank no keys (in a dense tail), see nothing, or without `only_ranked` all, so
// that no step needs a mask for their sake. All threads of the CTA; with a barrier.
__device__ inline bool PlaceRankUnit(const RankArgs& args, bool only_ranked, int (&limit)[kRankColumns],
                                     RankUnit& unit) {
  __shared__ int most_of_warp[kRankWarps], whole_of_warp[kRankWarps];
  const RankShape& a = args.shape;
  const int slots = args.end_slot - args.first_slot;
  const int chunk = static_cast<int>(blockIdx.x) / slots, slot = static_cast<int>(blockIdx.x) - chunk * slots;
  unit.begin = chunk * args.chunk;
  if (!PlaceSlot(a, args.first_slot + slot, unit.slot)) return false;
  const DeviceSequence& s = unit.slot.sequence;
  if (unit.begin >= s.k_len || s.k_len <= a.rules.dense_up_to_keys || KeepsEverything(a.d.p, a.rules, s)) return false;
  const int j = threadIdx.x;
  const RankColumn column = RankColumn::At(a, j);
  int most = 0, whole = std::numeric_limits<int>::max(), seen = only_ranked ? 0 : whole;
  if (column.list < unit.slot.lists && column.head < a.heads) {
    const DeviceSegment segment = SegmentAt(a, s, unit.slot.Segment(a, column.list));
    if (segment.first_key < segment.end_key) {
      seen = whole = segment.seen;
      most = only_ranked ? segment.end_key : seen;
    }
  }
  limit[j] = seen;
  most = __reduce_max_sync(~0u, most);
  whole = __reduce_min_sync(~0u, whole);
  if (j % 32 == 0) {
    most_of_warp[j / 32] = most;
    whole_of_warp[j / 32] = whole;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kRankWarps; ++w) {
    most = max(most, most_of_warp[w]);
    whole = min(whole, whole_of_warp[w]);
  }
  unit.whole = whole;
  unit.steps = (min(args.chunk, most - unit.begin) + kRankStep - 1) / kRankStep;
  return unit.steps > 0;
}

// A step's keys and the mean queries, in shared memory. A thread copies the same 16 bytes of keys a fixed number apart,
// so that where keys lie evenly it finds the next one by an addition. There is one stage: the next step's keys come
// while this one's exponentials are made, and four CTAs have room on a multiprocessor.
template <class PRODUCT, typename T, int PANELS>
struct RankProduct {
  static constexpr int kRowBytes = kPanelBytes<PANELS, kRankColumns>;
  static constexpr int kBytes = kRowBytes + kPanelBytes<PANELS, kRankStep>;
  // Codes lie where the keys were, which are sent for when the codes have left.
  static constexpr bool kCodesOverKeys = PANELS == 4 && kRankPortable<PRODUCT>;
  static constexpr int kChunks = PANELS * 8, kKeysAtOnce = kPanelThreads / kChunks;

  const Problem& p;
  const Divider& by_page;
  const RankUnit& unit;
  char* shared;
  int key;        // the next key to be copied
  bool wanted;    // whether rows have this thread's 16 bytes
  const T* next;  // where keys lie evenly, the next source; else that of the first page's first key
  int64_t apart;  // elements
  uint32_t place; // of the first key's 16 bytes in shared memory, but for the swizzle
  int swizzle;

  __device__ RankProduct(const RankArgs& args, const RankUnit& u, char* memory)
      : p(args.shape.d.p), by_page(args.shape.by_page), unit(u), shared(memory) {
    const RankShape& a = args.shape;
    const int first = threadIdx.x / kChunks, piece = threadIdx.x % kChunks, kv = unit.slot.kv;
    key = unit.begin + first;
    wanted = piece * 8 < p.head_dim;
    apart = kKeysAtOnce * p.k.stride[1];
    next = static_cast<const T*>(p.k.data) + (wanted ? piece * 8 : 0);
    next += p.block_table ? kv * p.k.stride[2] : KeyOffsetAt(p, p.k.stride, unit.slot.sequence, key, kv);
    place = SharedAddress(shared) + kRowBytes + piece / 8 * (kRankStep * kPanelRowBytes) + first * kPanelRowBytes;
    swizzle = piece % 8 ^ first % 8;
    // Rows of lists and heads that are not there are zeros: their scores must not be NaN.
    const T* const rows = static_cast<const T*>(args.rows) + (unit.slot.RowOf(a, 0) << a.log2_columns) * args.pitch;
    CopyRows<PANELS, kRankColumns>(shared, p.head_dim, args.rows, [&](int j) -> const T* {
      const RankColumn column = RankColumn::At(a, j);
      const bool there = column.list < unit.slot.lists && column.head < a.heads;
      return there ? rows + int64_t{(column.list << a.log2_columns) + column.head} * args.pitch : nullptr;
    });
    CopyKeys();
  }

  // Of the next step.
  __device__ __forceinline__ void CopyKeys() {
    const int k_len = unit.slot.sequence.k_len;
    const auto copy = [&](int i, const T* from) {
      const int row = i * kKeysAtOnce;
      AsyncCopy16(place + row * kPanelRowBytes + (swizzle ^ row % 8) * 16, from, wanted && key < k_len);
    };
    if (p.block_table == nullptr) {
#pragma unroll
      for (int i = 0; i < kRankStep / kKeysAtOnce; ++i, key += kKeysAtOnce, next += apart) copy(i, next);
      return;
    }
#pragma unroll 8
    for (int i = 0; i < kRankStep / kKeysAtOnce; ++i, key += kKeysAtOnce) {
      const int at = min(key, k_len - 1), index = by_page(at);
      copy(i, next + PageAt(p, unit.slot.sequence.index, index) * p.k.stride[0] +
                  (at - index * p.page_size) * p.k.stride[1]);
    }
  }

  // The product of a step; then, unless keys are to wait, the next one's are sent for. Two barriers, which all other
  // shared memory may count on.
  template <bool WAIT = false>
  __device__ __forceinline__ void Step(int step, float (&d)[kRankColumns / 2]) {
    AsyncCopyWaitAll();
    PRODUCT::Fence();
    __syncthreads();
    PRODUCT::template Multiply<T, PANELS, kRankColumns>(d, shared + kRowBytes, shared, [] {});
    __syncthreads(); // everybody has read the keys
    if (!WAIT) CopyKeysAfter(step);
  }

  __device__ __forceinline__ void CopyKeysAfter(int step) {
    if (step + 1 < unit.steps) CopyKeys();
  }
};

// Value 4 c + 2 half + e of a thread is row 16 warp + lane / 4 + 8 half of D, column 8 c + 2 (lane % 4) + e.
template <class PRODUCT, typename T, int PANELS>
__global__ void __launch_bounds__(kPanelThreads, kRankCtas<PRODUCT, PANELS>)
    RankSumsKernel(const __grid_constant__ RankArgs args) {
  extern __shared__ char raw[];
  __shared__ alignas(8) float reference[kRankWarps][kRankColumns];
  __shared__ alignas(8) int limit[kRankColumns];
  const RankShape& a = args.shape;
  RankUnit unit;
  if (!PlaceRankUnit(args, false, limit, unit)) return;
  char* const memory = AlignedRankPanels<PRODUCT>(raw);
  RankProduct<PRODUCT, T, PANELS> product(args, unit, memory);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, pair = 2 * (lane % 4);
  float* const mine = reference[warp];
  for (int j = lane; j < kRankColumns; j += 32) mine[j] = kNoReference;
  __syncwarp();

  float sum[kRankColumns / 4] = {};
#pragma unroll 1
  for (int step = 0; step < unit.steps; ++step) {
    float d[kRankColumns / 2];
    product.Step(step, d);
    const int key = unit.begin + step * kRankStep + 16 * warp + lane / 4;
    if (unit.begin + (step + 1) * kRankStep > unit.whole) { // the last few thousand keys of a slot
#pragma unroll
      for (int c = 0; c < kRankColumns / 8; ++c) {
        const int2 seen = *reinterpret_cast<const int2*>(&limit[8 * c + pair]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (key + 8 * half >= seen.x) d[4 * c + 2 * half] = -INFINITY;
          if (key + 8 * half >= seen.y) d[4 * c + 2 * half + 1] = -INFINITY;
        }
      }
    }
    // Add up against the references, as far as that goes, some columns at a time.
#pragma unroll
    for (int first = 0; first < kRankColumns / 4; first += kSumColumns) {
      float x[kSumColumns], check = 0;
#pragma unroll
      for (int i = 0; i < kSumColumns; i += 2) {
        const int c = (first + i) / 2;
        const float2 base = *reinterpret_cast<const float2*>(&mine[8 * c + pair]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float offset = e ? -base.y : -base.x;
          x[i + e] = Exp2(fmaf(d[4 * c + e], a.exponent_scale, offset)) +
                     Exp2(fmaf(d[4 * c + 2 + e], a.exponent_scale, offset));
          check += x[i + e];
        }
      }
      if (__all_sync(~0u, check < kLargeSum)) {
#pragma unroll
        for (int i = 0; i < kSumColumns; ++i) sum[first + i] += x[i];
        continue;
      }
      // Else again, with new references and without what is no number.
#pragma unroll
      for (int i = first; i < first + kSumColumns; ++i) {
        const int j = i / 2 * 8 + pair + i % 2;
        float z[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float score = d[i / 2 * 4 + 2 * half + i % 2] * a.exponent_scale;
          z[half] = IsFinite(score) ? score : -INFINITY;
        }
        const float old = mine[j];
        float largest = fmaxf(z[0], z[1]);
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
        largest = fmaxf(largest, old);
        sum[i] = sum[i] * Exp2(old - largest) + (Exp2(z[0] - largest) + Exp2(z[1] - largest));
        __syncwarp();
        if (lane < 4) mine[j] = largest;
      }
      __syncwarp();
    }
  }

  // Join lanes, then warps: where the keys were.
  auto* const partial = reinterpret_cast<float(*)[kRankColumns]>(memory + product.kRowBytes);
#pragma unroll
  for (int i = 0; i < kRankColumns / 4; ++i) {
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], offset);
    if (lane < 4) partial[warp][i / 2 * 8 + pair + i % 2] = sum[i];
  }
  __syncthreads();
  const int j = threadIdx.x;
  float largest = kNoReference, total = 0;
#pragma unroll
  for (int w = 0; w < kRankWarps; ++w) largest = fmaxf(largest, reference[w][j]);
#pragma unroll
  for (int w = 0; w < kRankWarps; ++w) {
    if (reference[w][j] > kNoReference) total += partial[w][j] * Exp2(reference[w][j] - largest);
  }
  const int chunk = a.by_chunks(unit.begin);
  args.lse[(int64_t{unit.slot.slot} * a.chunks + chunk) * kRankColumns + j] =
      largest == kNoReference ? -INFINITY : largest + log2f(total);
}

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

// COLUMNS: the shape's columns; 0: any number but 1.
template <class PRODUCT, typename T, int PANELS, int COLUMNS>
__global__ void __launch_bounds__(kPanelThreads, COLUMNS > 0 ? kRankCtas<PRODUCT, PANELS> : kRankCtas<PRODUCT, 4>)
    RankCodesKernel(const __grid_constant__ RankArgs args) {
  extern __shared__ char raw[];
  __shared__ alignas(8) float denominator[kRankColumns];
  __shared__ int limit[kRankColumns];
  const RankShape& a = args.shape;
  RankUnit unit;
  if (!PlaceRankUnit(args, true, limit, unit)) return;
  using Product = RankProduct<PRODUCT, T, PANELS>;
  constexpr bool kOverKeys = Product::kCodesOverKeys;
  char* const memory = AlignedRankPanels<PRODUCT>(raw);
  Product product(args, unit, memory);
  auto* const codes = // [lists of a slot, kCodePitch]
      reinterpret_cast<uint16_t*>(memory + (kOverKeys ? Product::kRowBytes : Product::kBytes));
  const int j = threadIdx.x;
  denominator[j] = RankDenominator(args, unit, j, limit[j]); // the first step has a barrier

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, pair = 2 * (lane % 4);
  const int key = 16 * warp + lane / 4; // of the step, and the one 8 on
  const int of_c = COLUMNS > 0 ? 0 : min(a.log2_columns - 1, 4), of_q = COLUMNS > 0 ? 0 : a.log2_columns - 1 - of_c;
  // Codes of this thread's keys of a step, of all its lists. Not `careful`: false if a share is no number, or too
  // large.
  const auto write_codes = [&](const float(&d)[kRankColumns / 2], auto careful) {
    bool numbers = true;
    const auto emit = [&](int list, int half, float squares) {
      numbers &= squares < 4.f;
      codes[list * kCodePitch + key + 8 * half] = static_cast<uint16_t>(CodeOf(squares));
    };
    [[maybe_unused]] float sum[2] = {}; // of squares, of both keys
#pragma unroll
    for (int c = 0; c < kRankColumns / 8; ++c) {
      const float2 base = *reinterpret_cast<const float2*>(&denominator[8 * c + pair]);
      float share[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          share[half][e] = Exp2(fmaf(d[4 * c + 2 * half + e], a.exponent_scale, e ? -base.y : -base.x));
          if (careful && !(share[half][e] < 2.f)) share[half][e] = 0; // counts for nothing
        }
      }
      if constexpr (COLUMNS == 1) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          emit(8 * c + pair, half, share[half][0] * share[half][0]);
          emit(8 * c + pair + 1, half, share[half][1] * share[half][1]);
        }
      } else {
        const int each = COLUMNS > 1 ? COLUMNS / 2 : 1 << of_c; // c of a list
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          sum[half] = fmaf(share[half][0], share[half][0], sum[half]);
          sum[half] = fmaf(share[half][1], share[half][1], sum[half]);
          if ((c + 1) % each != 0) continue;
          if constexpr (COLUMNS == 0) { // lanes that share a list all write it
            if (of_q > 0) sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
            if (of_q > 1) sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
          }
          emit((c / each * 4 + lane % 4) >> of_q, half, sum[half]);
          sum[half] = 0;
        }
      }
    }
    return numbers;
  };

  uint16_t* const out =
      args.codes + (int64_t{unit.slot.slot - args.first_slot} << a.log2_lists) * args.code_stride + unit.begin;
#pragma unroll 1
  for (int step = 0; step < unit.steps; ++step) {
    float d[kRankColumns / 2];
    product.template Step<kOverKeys>(step, d);
    if (!__all_sync(~0u, write_codes(d, std::false_type{}))) write_codes(d, std::true_type{});
    __syncthreads();
    // Write out: 16 bytes per thread.
    for (int i = threadIdx.x; i < unit.slot.lists * (kRankStep / 8); i += kPanelThreads) {
      const int list = i / (kRankStep / 8), piece = i % (kRankStep / 8);
      *reinterpret_cast<uint4*>(out + list * args.code_stride + step * kRankStep + piece * 8) =
          *reinterpret_cast<const uint4*>(codes + list * kCodePitch + piece * 8);
    }
    if constexpr (kOverKeys) {
      __syncthreads(); // the codes have been read
      product.CopyKeysAfter(step);
    }
  }
}

template <class PRODUCT, typename T, int PANELS>
auto CodesKernelFor(int columns) {
  if (columns == 1) return RankCodesKernel<PRODUCT, T, PANELS, 1>;
  if (columns == 4) return RankCodesKernel<PRODUCT, T, PANELS, 4>;
  if constexpr (!kRankPortable<PRODUCT>) { // where three architectures' code counts
    if (columns == 2) return RankCodesKernel<PRODUCT, T, PANELS, 2>;
    if (columns == 8) return RankCodesKernel<PRODUCT, T, PANELS, 8>;
  }
  return RankCodesKernel<PRODUCT, T, PANELS, 0>;
}

template <class PRODUCT, typename T, int PANELS>
cudaError_t LaunchRank(const RankArgs& args, bool sums, cudaStream_t stream) {
  using Product = RankProduct<PRODUCT, T, PANELS>;
  const RankShape& a = args.shape;
  const int64_t grid = int64_t{args.end_slot - args.first_slot} * DivUp<int64_t>(a.d.p.max_seqlen_k, args.chunk);
  if (grid == 0) return cudaSuccess;
  if (grid > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const auto kernel = sums ? RankSumsKernel<PRODUCT, T, PANELS> : CodesKernelFor<PRODUCT, T, PANELS>(a.columns);
  const int codes = sums || Product::kCodesOverKeys ? 0 : kCodePitch * 2 << a.log2_lists;
  const int bytes = Product::kBytes + kRankAlign<PRODUCT> + codes;
  if (cudaError_t e = AllowSharedOnly(kernel, bytes)) return e;
  kernel<<<static_cast<unsigned>(grid), kPanelThreads, static_cast<size_t>(bytes), stream>>>(args);
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
