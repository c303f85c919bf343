// How much each key holds of the softmax of segments' mean queries: two launches, each of which makes the product of
// all mean queries with every key before them, because writing scores would cost more than making them twice. A CTA is
// one warpgroup with 128 mean queries, those of a slot's lists, and one chunk of keys.
//
// First launch: the denominators of each mean query, over the keys that its segment's last row sees.
//
//     D[64 mean queries, 64 keys] = Q[64, d] . K[64, d]^T, of both halves by turns
//
// A thread has two mean queries' scores for 16 keys each. It adds up their exponentials, against any reference that
// keeps the sum in range; where it gets too large the step is done again with a new one, and without scores that are
// not finite. While the exponentials of one half are made, the matrix units work on the other or, where keys have one
// stage, the next ones come. With keys as rows and all mean queries as columns each thread had 32 sums and their
// references in shared memory: 404 instructions for 64 scores, and 1.17 ms at 128K tokens.
//
// Second launch: D[64 keys, 128 mean queries] = K[64, d] . Q[128, d]^T; shares, their squares added up over the heads
// of a list, and the code of the energy (args.h), 16 bits for each key and list. A thread of the product has two of
// every eight columns: a list's columns are put where one thread has them all, up to 32 of them, so that nothing is
// exchanged. Whether all shares are numbers is asked once per key and list, of the sum of their squares: if one is not,
// the warp does its step again, share by share. The number of columns is a template argument: asked at run time, and
// with logarithms for codes, this launch took 3.1 ms in place of 2.0 at 128K tokens. Codes leave through shared memory,
// 128 bytes per list and step.
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
constexpr int kSumsCtas = PANELS == 4 || kRankPortable<PRODUCT> ? 2 : 3; // per multiprocessor
template <class PRODUCT, int PANELS>
constexpr int kCodesCtas = PANELS == 4 || kRankPortable<PRODUCT> ? 2 : 4;
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

// Keys and the mean queries, in shared memory: these in panels of ROWS rows. A thread copies the same 16 bytes of keys
// a fixed number apart, so that where keys lie evenly it finds the next one by an addition.
template <class PRODUCT, typename T, int PANELS, int ROWS, int STAGES>
struct RankKeys {
  static constexpr int kPartBytes = kPanelBytes<PANELS, ROWS>; // of so many mean queries
  static constexpr int kRowBytes = kRankColumns / ROWS * kPartBytes, kStageBytes = kPanelBytes<PANELS, kRankStep>;
  static constexpr int kBytes = kRowBytes + STAGES * kStageBytes;
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

  __device__ RankKeys(const RankArgs& args, const RankUnit& u, char* memory)
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
#pragma unroll
    for (int part = 0; part < kRankColumns / ROWS; ++part) {
      CopyRows<PANELS, ROWS>(shared + part * kPartBytes, p.head_dim, args.rows, [&](int j) -> const T* {
        const RankColumn column = RankColumn::At(a, part * ROWS + j);
        const bool there = column.list < unit.slot.lists && column.head < a.heads;
        return there ? rows + int64_t{(column.list << a.log2_columns) + column.head} * args.pitch : nullptr;
      });
    }
    Copy(0);
  }

  // Of each step once, in order.
  __device__ __forceinline__ void Copy(int step) {
    if (step >= unit.steps) return;
    const uint32_t to = place + step % STAGES * kStageBytes;
    const int k_len = unit.slot.sequence.k_len;
    const auto copy = [&](int i, const T* from) {
      const int row = i * kKeysAtOnce;
      AsyncCopy16(to + row * kPanelRowBytes + (swizzle ^ row % 8) * 16, from, wanted && key < k_len);
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

  // The keys that were sent for last are there for all, and all have done with what came before.
  __device__ __forceinline__ void Wait() const {
    AsyncCopyWaitAll();
    PRODUCT::Fence();
    __syncthreads();
  }

  __device__ __forceinline__ const char* Keys(int step) const {
    return shared + kRowBytes + step % STAGES * kStageBytes;
  }
};

// ---------------------------------------------------------------- sums

// Value 4 c + 2 half + e of a thread is mean query 16 warp + lane / 4 + 8 half of the part, key 8 c + 2 (lane % 4) + e.
// The four lanes that share a mean query have one reference, and each the sum over its own keys.
template <class PRODUCT, typename T, int PANELS>
class RankSums {
 public:
  static constexpr int kStages = PANELS == 4 || kRankPortable<PRODUCT> ? 1 : 2; // of keys: two or three CTAs have room
  using Keys = RankKeys<PRODUCT, T, PANELS, kProductRows, kStages>;

  __device__ __forceinline__ RankSums(const RankArgs& args, const RankUnit& unit, const int (&limit)[kRankColumns],
                                      char* memory)
      : scale_(args.shape.exponent_scale),
        unit_(unit),
        limit_(limit),
        keys_(args, unit, memory),
        first_row_(static_cast<int>(threadIdx.x) / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4) {}

  __device__ __forceinline__ void Run() {
    float d[kParts][kRankStep / 2];
    const auto multiply = [&](int part, int step, auto&& meanwhile) {
      PRODUCT::template Multiply<T, PANELS, kRankStep>(d[part], keys_.shared + part * Keys::kPartBytes,
                                                       keys_.Keys(step), meanwhile);
    };
    keys_.Wait();
    multiply(0, 0, [&] {
      if (kStages > 1) keys_.Copy(1);
    });
#pragma unroll 1
    for (int step = 0;; ++step) {
      multiply(1, step, [&] { Add(d[0], 0, step); });
      if (kStages == 1) {
        __syncthreads(); // all have done with the keys
        keys_.Copy(step + 1);
        Add(d[1], 1, step);
      }
      if (step + 1 == unit_.steps) break;
      keys_.Wait();
      multiply(0, step + 1, [&] {
        if (kStages == 1) return;
        keys_.Copy(step + 2);
        Add(d[1], 1, step);
      });
    }
    if (kStages > 1) Add(d[1], 1, unit_.steps - 1);
  }

  // Logarithms of the sums.
  __device__ __forceinline__ void Store(float* to) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = sum_[part][half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const float reference = reference_[part][half];
        if (threadIdx.x % 4 == 0) {
          to[Row(part, half)] = reference == kNoReference ? -INFINITY : reference + log2f(total);
        }
      }
    }
  }

 private:
  static constexpr int kParts = kRankColumns / kProductRows;
  static_assert(kParts == 2, "one part's products run while another's exponentials are made");

  __device__ __forceinline__ int Row(int part, int half) const { return part * kProductRows + first_row_ + 8 * half; }

  // A step's keys of a part.
  __device__ __forceinline__ void Add(float (&d)[kRankStep / 2], int part, int step) {
    const int begin = unit_.begin + step * kRankStep;
    if (begin + kRankStep > unit_.whole) { // the last few thousand keys of a slot
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int left = limit_[Row(part, half)] - begin - 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
        for (int c = 0; c < kRankStep / 8; ++c) {
          if (8 * c >= left) d[4 * c + 2 * half] = -INFINITY;
          if (8 * c + 1 >= left) d[4 * c + 2 * half + 1] = -INFINITY;
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
  Keys keys_;
  const int first_row_; // of a part
  float sum_[kParts][2] = {}, reference_[kParts][2] = {{kNoReference, kNoReference}, {kNoReference, kNoReference}};
};

template <class PRODUCT, typename T, int PANELS>
__global__ void __launch_bounds__(kPanelThreads, kSumsCtas<PRODUCT, PANELS>)
    RankSumsKernel(const __grid_constant__ RankArgs args) {
  extern __shared__ char raw[];
  __shared__ int limit[kRankColumns];
  RankUnit unit;
  if (!PlaceRankUnit(args, false, limit, unit)) return;
  RankSums<PRODUCT, T, PANELS> sums(args, unit, limit, AlignedRankPanels<PRODUCT>(raw));
  sums.Run();
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

template <class PRODUCT, typename T, int PANELS>
using CodesKeys = RankKeys<PRODUCT, T, PANELS, kRankColumns, 1>;
// Codes lie where the keys were, which are sent for when the codes have left.
template <class PRODUCT, int PANELS>
constexpr bool kCodesOverKeys = PANELS == 4 && kRankPortable<PRODUCT>;

// Value 4 c + 2 half + e of a thread is key 16 warp + lane / 4 + 8 half, column 8 c + 2 (lane % 4) + e. There is one
// stage: the next step's keys come while this one's exponentials are made, and four CTAs have room on a multiprocessor.
// COLUMNS: the shape's columns; 0: any number but 1.
template <class PRODUCT, typename T, int PANELS, int COLUMNS>
__global__ void __launch_bounds__(kPanelThreads, COLUMNS > 0 ? kCodesCtas<PRODUCT, PANELS> : kCodesCtas<PRODUCT, 4>)
    RankCodesKernel(const __grid_constant__ RankArgs args) {
  extern __shared__ char raw[];
  __shared__ alignas(8) float denominator[kRankColumns];
  __shared__ int limit[kRankColumns];
  const RankShape& a = args.shape;
  RankUnit unit;
  if (!PlaceRankUnit(args, true, limit, unit)) return;
  using Keys = CodesKeys<PRODUCT, T, PANELS>;
  constexpr bool kOverKeys = kCodesOverKeys<PRODUCT, PANELS>;
  char* const memory = AlignedRankPanels<PRODUCT>(raw);
  Keys keys(args, unit, memory);
  auto* const codes = // [lists of a slot, kCodePitch]
      reinterpret_cast<uint16_t*>(memory + (kOverKeys ? Keys::kRowBytes : Keys::kBytes));
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
    keys.Wait();
    PRODUCT::template Multiply<T, PANELS, kRankColumns>(d, keys.Keys(0), keys.shared, [] {});
    __syncthreads(); // everybody has read the keys
    if (!kOverKeys) keys.Copy(step + 1);
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
      keys.Copy(step + 1);
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
  const RankShape& a = args.shape;
  const int64_t grid = int64_t{args.end_slot - args.first_slot} * DivUp<int64_t>(a.d.p.max_seqlen_k, args.chunk);
  if (grid == 0) return cudaSuccess;
  if (grid > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const auto kernel = sums ? RankSumsKernel<PRODUCT, T, PANELS> : CodesKernelFor<PRODUCT, T, PANELS>(a.columns);
  const int codes = kCodesOverKeys<PRODUCT, PANELS> ? 0 : kCodePitch * 2 << a.log2_lists;
  const int bytes =
      (sums ? RankSums<PRODUCT, T, PANELS>::Keys::kBytes : CodesKeys<PRODUCT, T, PANELS>::kBytes + codes) +
      kRankAlign<PRODUCT>;
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
