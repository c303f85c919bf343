// The product of a slot's mean queries with the keys of a chunk, for rank.cuh: a CTA is one warpgroup with 128 mean
// queries and one chunk of keys, and makes
//
//     D[64 mean queries, 64 keys] = Q[64, d] . K[64, d]^T, of both halves by turns
//
// While one half's scores are used, the matrix units work on the other or, where keys have one stage, the next ones
// come. A thread has of each product two mean queries, of up to four heads of one list with both, and 16 keys that
// follow each other: rows of Q and K are put so that these are its values of D. With keys as rows and all mean queries
// as columns a thread had two keys, and what belongs to a mean query was in shared memory.
#ifndef FLASHPREFILL_CUDA_COMMON_GATHER_RANK_PRODUCT_CUH_
#define FLASHPREFILL_CUDA_COMMON_GATHER_RANK_PRODUCT_CUH_

#include <limits>

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
constexpr int kRankCtas = PANELS == 4 || kRankPortable<PRODUCT> ? 2 : 3; // per multiprocessor
constexpr int kRankParts = kRankColumns / kProductRows;                  // of the mean queries
constexpr int kRankKeys = kRankStep / 4;                                 // of a step, of a thread

template <class PRODUCT>
__device__ __forceinline__ char* AlignedRankPanels(char* raw) {
  constexpr uint32_t kAlign = kRankAlign<PRODUCT>;
  return raw + (kAlign - SharedAddress(raw) % kAlign) % kAlign;
}

// Which mean query is row 64 part + 16 warp + 8 half + i of both products: the bits of its head are half, part, i, warp
// from the lowest on, those of its list what is left.
struct RankColumn {
  int list, head; // of the slot, of the list

  __device__ static RankColumn At(const RankShape& a, int j) {
    const int of_thread = (j / 8 % 2) | (j / 64) << 1, x = of_thread | (j % 8) << 2 | (j / 16 % 4) << 5;
    return {x >> a.log2_columns, x & (a.columns - 1)};
  }
};

// The row of K of a step's key in shared memory, so that columns 8 c + 2 t + e of D are keys 16 t + 2 c + e. Of bits of
// its argument alone: rows of sums without carry are sums.
__host__ __device__ constexpr int RankRowOfKey(int key) { return key % 16 / 2 * 8 + key / 16 * 2 + key % 2; }

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

// The mean queries in two parts, and keys, in shared memory. A thread copies the same 16 bytes of keys a fixed number
// apart, so that where keys lie evenly it finds the next one by an addition.
template <class PRODUCT, typename T, int PANELS>
struct RankProduct {
  static constexpr int kStages = PANELS == 4 || kRankPortable<PRODUCT> ? 1 : 2; // of keys: two or three CTAs have room
  static constexpr int kPartBytes = kPanelBytes<PANELS, kProductRows>, kStageBytes = kPanelBytes<PANELS, kRankStep>;
  static constexpr int kRowBytes = kRankParts * kPartBytes, kBytes = kRowBytes + kStages * kStageBytes;
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
    const int first = threadIdx.x / kChunks, row = RankRowOfKey(first), piece = threadIdx.x % kChunks;
    const int kv = unit.slot.kv;
    key = unit.begin + first;
    wanted = piece * 8 < p.head_dim;
    apart = kKeysAtOnce * p.k.stride[1];
    next = static_cast<const T*>(p.k.data) + (wanted ? piece * 8 : 0);
    next += p.block_table ? kv * p.k.stride[2] : KeyOffsetAt(p, p.k.stride, unit.slot.sequence, key, kv);
    place = SharedAddress(shared) + kRowBytes + piece / 8 * (kRankStep * kPanelRowBytes) + row * kPanelRowBytes;
    swizzle = piece % 8 ^ row % 8;
    // Rows of lists and heads that are not there are zeros: their scores must not be NaN.
    const T* const rows = static_cast<const T*>(args.rows) + (unit.slot.RowOf(a, 0) << a.log2_columns) * args.pitch;
#pragma unroll
    for (int part = 0; part < kRankParts; ++part) {
      CopyRows<PANELS, kProductRows>(shared + part * kPartBytes, p.head_dim, args.rows, [&](int j) -> const T* {
        const RankColumn column = RankColumn::At(a, part * kProductRows + j);
        const bool there = column.list < unit.slot.lists && column.head < a.heads;
        return there ? rows + int64_t{(column.list << a.log2_columns) + column.head} * args.pitch : nullptr;
      });
    }
    Copy(0);
  }

  // use(d, part, step) for each part of each step, part 0 first. The first step's keys are there: Wait() is the
  // caller's.
  template <typename Use>
  __device__ __forceinline__ void ForEachPart(Use& use) {
    float d[kRankParts][kRankStep / 2];
    static_assert(kRankParts == 2, "one part's products run while another is used");
    Multiply(d[0], 0, 0, [&] {
      if (kStages > 1) Copy(1);
    });
#pragma unroll 1
    for (int step = 0;; ++step) {
      Multiply(d[1], 1, step, [&] { use(d[0], 0, step); });
      if (kStages == 1) {
        __syncthreads(); // all have done with the keys
        Copy(step + 1);
        use(d[1], 1, step);
      }
      if (step + 1 == unit.steps) break;
      Wait();
      Multiply(d[0], 0, step + 1, [&] {
        if (kStages == 1) return;
        Copy(step + 2);
        use(d[1], 1, step);
      });
    }
    if (kStages > 1) use(d[1], 1, unit.steps - 1);
  }

  // The keys that were sent for last are there for all, and all have done with what came before.
  __device__ __forceinline__ void Wait() const {
    AsyncCopyWaitAll();
    PRODUCT::Fence();
    __syncthreads();
  }

 private:
  template <typename Meanwhile>
  __device__ __forceinline__ void Multiply(float (&d)[kRankStep / 2], int part, int step, Meanwhile&& meanwhile) {
    PRODUCT::template Multiply<T, PANELS, kRankStep>(d, shared + part * kPartBytes,
                                                     shared + kRowBytes + step % kStages * kStageBytes, meanwhile);
  }

  // Of each step once, in order.
  __device__ __forceinline__ void Copy(int step) {
    if (step >= unit.steps) return;
    const uint32_t to = place + step % kStages * kStageBytes;
    const int k_len = unit.slot.sequence.k_len;
    const auto copy = [&](int i, const T* from) {
      const int row = RankRowOfKey(i * kKeysAtOnce);
      AsyncCopy16(to + row * kPanelRowBytes + (swizzle ^ row % 8) * 16, from, wanted && key < k_len);
    };
    if (p.block_table == nullptr) {
#pragma unroll
      for (int i = 0; i < kRankStep / kKeysAtOnce; ++i, key += kKeysAtOnce, next += apart) copy(i, next);
      return;
    }
#pragma unroll
    for (int i = 0; i < kRankStep / kKeysAtOnce; ++i, key += kKeysAtOnce) {
      const int at = min(key, k_len - 1), index = by_page(at);
      copy(i, next + PageAt(p, unit.slot.sequence.index, index) * p.k.stride[0] +
                  (at - index * p.page_size) * p.k.stride[1]);
    }
  }
};

// Value 4 c + 2 half + e of a thread is this row of the mean queries, key 16 (lane % 4) + 2 c + e of the step.
__device__ __forceinline__ int RankRow(int part, int half) {
  const int thread = threadIdx.x;
  return part * kProductRows + thread / 32 * 16 + half * 8 + thread % 32 / 4;
}

} // namespace
} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_GATHER_RANK_PRODUCT_CUH_
