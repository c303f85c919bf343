// S2O's second step: a CTA of one warpgroup has the list of one mask head and segment, whose best keys choose.cu has
// found. It sorts them, and takes them 128 at a time until what they add to a few rows is little, twice in a row.
//
// The sort is a stable radix sort in shared memory, by the lower and then by the upper half of a key's code; as the
// list ascends, equal energies come by index. A warp counts and places its own part of the keys, 32 at a time, so that
// there is no barrier but between the parts of a pass.
//
// Then the rows' sums of exponentials: first over the keys in their blocks, which are neighbours, then over groups of
// ranked keys, which are gathered; 64 keys by all rows per product (key_product.cuh has the sums), where there are not
// more than 32 or 128. All steps are one stream, so that each step's keys come while the step before is multiplied,
// also while a group's sums are joined. References are the warps' own and stay from step to step: after the first
// steps nothing is larger, so no maximum is looked for. A row's sum is kept as its logarithm. With more rows each panel
// of rows meets all keys of a group in turn. Every sum has one order, whatever else runs: no atomics.
#ifndef FLASHPREFILL_CUDA_COMMON_GATHER_STOP_CUH_
#define FLASHPREFILL_CUDA_COMMON_GATHER_STOP_CUH_

#include <limits>

#include "core/stop_rows.h"
#include "cuda/common/gather/key_bins.cuh"
#include "cuda/common/key_product.cuh"
#include "cuda/common/launch.h"

namespace flashprefill::cuda {
namespace {

constexpr int kFewRows = 32, kManyRows = 128; // per product
constexpr int kStopWarps = kPanelThreads / 32;
constexpr int kDigits = 256;          // of half a code
constexpr float kNothingYet = -1e30f; // a reference against which every score is too large, and no score is nothing

template <int COLUMNS>
struct StopShared {
  float reference[kStopWarps][COLUMNS];
  float part[kStopWarps][COLUMNS]; // logarithms of a pass's sums, by warp
  int limit[COLUMNS];              // of the panel's rows: how many keys they see
  uint32_t scan[kStopWarps];
};

// What the CTA works on.
struct StopUnit {
  DeviceSequence sequence;
  DeviceSegment segment;
  int kv, head;   // first query head of the list
  int of_head;    // rows of a head that decide
  int rows, kept; // rows of all heads; keys of the list
};

// Bytes of shared memory, in this order.
template <class PRODUCT, int PANELS, int COLUMNS>
struct StopMemory {
  static constexpr int kRingStages = PRODUCT::template kStages<PANELS>;
  static constexpr int kRowBytes = kPanelBytes<PANELS, COLUMNS>, kStageBytes = kPanelBytes<PANELS, kProductRows>;
  static_assert(kRowBytes >= kStopWarps * kDigits * 4, "the sort's counts lie where the rows will");
  int64_t ring, sums, keys; // the ring of keys, before that the sort's words, at last a bitmap; sums; the ranked keys

  __host__ __device__ StopMemory(int64_t rows, int64_t room)
      : ring(room * 4 > kRingStages * kStageBytes ? (room + 3) / 4 * 16 : kRingStages * kStageBytes),
        sums(rows * 8),
        keys((room + kProductRows - 1) / kProductRows * kProductRows * 4) {}
  __host__ __device__ int64_t Bytes() const {
    return kRowBytes + ring + static_cast<int64_t>(sizeof(StopShared<COLUMNS>)) + sums + keys;
  }
};

template <class PRODUCT, typename T, int PANELS, int COLUMNS>
class Stopper {
  using Memory = StopMemory<PRODUCT, PANELS, COLUMNS>;

 public:
  __device__ Stopper(const KeyStopArgs& args, const StopUnit& unit, char* memory, const uint16_t* codes, int32_t* list)
      : args_(args),
        p_(args.shape.d.p),
        unit_(unit),
        layout_(unit.rows, args.room),
        memory_(memory),
        sm_(*reinterpret_cast<StopShared<COLUMNS>*>(memory + Memory::kRowBytes + layout_.ring)),
        sums_(reinterpret_cast<float*>(&sm_ + 1)),
        ranked_(reinterpret_cast<int32_t*>(sums_ + 2 * unit.rows)),
        codes_(codes),
        list_(list),
        lane_(threadIdx.x % 32),
        warp_(__shfl_sync(~0u, threadIdx.x / 32, 0)),
        panels_((unit.rows + COLUMNS - 1) / COLUMNS),
        in_blocks_(unit.segment.first_key + unit.segment.seen - unit.segment.end_key),
        block_steps_((in_blocks_ + kProductRows - 1) / kProductRows),
        end_(block_steps_ + (unit.kept + kProductRows - 1) / kProductRows),
        row_sums_{sm_.reference[warp_], args.shape.exponent_scale} {
    first_key_ = static_cast<const T*>(p_.k.data) +
                 (p_.block_table ? unit.kv * p_.k.stride[2] : KeyOffsetAt(p_, p_.k.stride, unit.sequence, 0, unit.kv));
  }

  // Returns how many keys are taken, and whether rows said so.
  __device__ int Stop(bool* stopped) {
    Sort();
    if (panels_ == 1) Begin(0, 0);
    for (int panel = 0; panel < panels_; ++panel) {
      Pass(panel, 0, block_steps_);
      Join(panel, true, 0);
    }
    constexpr int kGroupSteps = kGroupKeys / kProductRows;
    int below = 0, turn = 1;
    *stopped = false;
    for (int first = 0; first < unit_.kept; first += kGroupKeys, turn ^= 1) {
      const int step = block_steps_ + first / kProductRows;
      const int end = min(step + kGroupSteps, block_steps_ + (unit_.kept + kProductRows - 1) / kProductRows);
      Ratios ratios{};
      for (int panel = 0; panel < panels_; ++panel) {
        Pass(panel, step, end);
        const Ratios its = Join(panel, false, turn);
        ratios.sum += its.sum;
        ratios.count += its.count;
      }
      const float sum = WarpSum(ratios.sum);
      const int count = __reduce_add_sync(~0u, ratios.count);
      below = (count == 0 ? 0.f : sum / static_cast<float>(count)) < args_.tau ? below + 1 : 0;
      if (below == kGroupsBelow) {
        *stopped = true;
        return min(first + static_cast<int>(kGroupKeys), unit_.kept);
      }
    }
    return unit_.kept;
  }

  // Leaves the best `count` keys of the list, ascending: by a bitmap of as many keys as there is room for at a time.
  __device__ void Keep(int count) {
    if (count == unit_.kept) return;
    AsyncCopyWaitAll(); // of a step that is not wanted
    uint32_t* const bits = Words();
    const int words = static_cast<int>(layout_.ring / 4), each = words / kStopWarps; // of a warp
    const int ranked = unit_.segment.end_key - unit_.segment.first_key;
    int before = 0;
    for (int first = 0; first < ranked; first += words * 32) {
      const int used = min(words, (ranked - first + 31) / 32);
      __syncthreads(); // the products, or the last keys of the bitmap, are done
      for (int i = threadIdx.x; i < used; i += kPanelThreads) bits[i] = 0;
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += kPanelThreads) {
        const int at = ranked_[i] - unit_.segment.first_key - first;
        if (at >= 0 && at / 32 < used) atomicOr(&bits[at / 32], 1u << at % 32);
      }
      __syncthreads();
      const int begin = warp_ * each, end = min(begin + each, used);
      uint32_t own = 0;
      for (int i = begin + lane_; i < end; i += 32) own += __popc(bits[i]);
      own = __reduce_add_sync(~0u, own);
      if (lane_ == 0) sm_.scan[warp_] = own;
      __syncthreads();
      int at = before;
#pragma unroll
      for (int w = 0; w < kStopWarps; ++w) {
        at += w < warp_ ? static_cast<int>(sm_.scan[w]) : 0;
        before += static_cast<int>(sm_.scan[w]);
      }
      for (int i = begin; i < end; i += 32) {
        uint32_t left = i + lane_ < end ? bits[i + lane_] : 0;
        const uint32_t its = __popc(left), sum = SumUpToLane(its, lane_);
        int32_t* to = list_ + at + (sum - its);
        for (; left; left &= left - 1) *to++ = unit_.segment.first_key + first + (i + lane_) * 32 + __ffs(left) - 1;
        at += static_cast<int>(__shfl_sync(~0u, sum, 31));
      }
    }
  }

 private:
  struct Ratios {
    float sum;
    int count;
  };

  __device__ static int Padded(int keys) { return (keys + kProductRows - 1) / kProductRows * kProductRows; }
  __device__ uint32_t* Words() const { return reinterpret_cast<uint32_t*>(memory_ + Memory::kRowBytes); }

  // ---------------------------------------------------------------- the order

  __device__ void Sort() const {
    uint32_t* const words = Words();
    auto* const codes = reinterpret_cast<uint16_t*>(ranked_); // of the list's keys, until these are there
    const int base = unit_.segment.first_key;
#pragma unroll 8
    for (int i = threadIdx.x; i < unit_.kept; i += kPanelThreads) codes[i] = codes_[list_[i]];
    __syncthreads();
    SortBy(
        [&](int i) { return codes[i] % kDigits; },
        [&](int i) { return static_cast<uint32_t>(codes[i] / kDigits) << 24 | static_cast<uint32_t>(list_[i] - base); },
        [&](uint32_t place, uint32_t word) { words[place] = word; });
    SortBy([&](int i) { return static_cast<int>(words[i] >> 24); }, [&](int i) { return words[i]; },
           [&](uint32_t place, uint32_t word) { ranked_[place] = base + static_cast<int>(word & 0xffffff); });
    // Steps of keys are whole: what comes after the last one is read, and counts for nothing.
    for (int i = unit_.kept + threadIdx.x; i < Padded(unit_.kept); i += kPanelThreads) ranked_[i] = base;
    __syncthreads();
  }

  // A pass over the list's keys: of each its digit, and a word that it puts where the key comes to stand. Those of the
  // largest digit come first, those of one as they came.
  template <typename Digit, typename Word, typename Put>
  __device__ void SortBy(Digit&& digit, Word&& word, Put&& put) const {
    uint32_t* const counts = reinterpret_cast<uint32_t*>(memory_); // [warps][digits], then places
    uint32_t* const mine = counts + warp_ * kDigits;
    const int each = (unit_.kept + kPanelThreads - 1) / kPanelThreads * 32; // of a warp
    const int begin = warp_ * each, end = min(begin + each, unit_.kept);
    for (int i = lane_; i < kDigits; i += 32) mine[i] = 0;
    __syncwarp();
#pragma unroll 4
    for (int i = begin + lane_; i < end; i += 32) atomicAdd(&mine[digit(i)], 1u);
    __syncthreads();
    uint32_t own = 0;                               // of two digits
    const auto count_of = [&](int k) -> uint32_t& { // the thread's, in the order of places
      return counts[k % kStopWarps * kDigits + kDigits - 1 - 2 * static_cast<int>(threadIdx.x) - k / kStopWarps];
    };
#pragma unroll
    for (int k = 0; k < 2 * kStopWarps; ++k) own += count_of(k);
    const uint32_t sum = SumUpToLane(own, lane_);
    if (lane_ == 31) sm_.scan[warp_] = sum;
    __syncthreads();
    uint32_t before = sum - own;
#pragma unroll
    for (int w = 0; w < kStopWarps; ++w) before += w < warp_ ? sm_.scan[w] : 0;
#pragma unroll
    for (int k = 0; k < 2 * kStopWarps; ++k) {
      const uint32_t its = count_of(k);
      count_of(k) = before;
      before += its;
    }
    __syncthreads();
    constexpr int kAhead = 4; // rounds whose words are asked for at a time
    uint32_t ahead[kAhead];
    const auto ask = [&](int first) {
#pragma unroll
      for (int r = 0; r < kAhead; ++r) ahead[r] = first + 32 * r < end ? word(first + 32 * r) : 0;
    };
    ask(begin + lane_);
#pragma unroll 1
    for (int first = begin + lane_; first - lane_ < end; first += 32 * kAhead) {
      uint32_t words[kAhead];
#pragma unroll
      for (int r = 0; r < kAhead; ++r) words[r] = ahead[r];
      ask(first + 32 * kAhead);
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        const int i = first + 32 * r;
        const bool there = i < end;
        const int its = there ? digit(i) : kDigits;
        const uint32_t peers = __match_any_sync(~0u, its);
        const uint32_t place = there ? mine[its] + __popc(peers & ((1u << lane_) - 1)) : 0;
        __syncwarp();
        if (there) {
          if (peers >> lane_ == 1) mine[its] = place + 1; // the last of its digit
          put(place, words[r]);
        }
        __syncwarp();
      }
    }
    __syncthreads();
  }

  // ---------------------------------------------------------------- products

  // A panel's rows into shared memory, rows that are not there as zeros; and the keys of the first of its steps.
  __device__ void Begin(int panel, int first) {
    __syncthreads(); // the last product is done with the rows before
    const int heads = args_.shape.heads;
    const auto token = [&](int row) { return static_cast<int>(StopRow(unit_.segment, row / heads, unit_.of_head)); };
    if (threadIdx.x < COLUMNS) { // a row that is not there sees all, so that no step is done again for its sake
      const int row = panel * COLUMNS + threadIdx.x;
      sm_.limit[threadIdx.x] = row < unit_.rows ? unit_.sequence.prefix + token(row) + 1 : unit_.segment.seen;
    }
    CopyRows<PANELS, COLUMNS>(memory_, p_.head_dim, p_.q.data, [&](int j) -> const T* {
      const int row = panel * COLUMNS + j;
      if (row >= unit_.rows) return nullptr;
      const int head = unit_.head + row % heads;
      return static_cast<const T*>(p_.q.data) + RowOffsetAt(p_, p_.q.stride, unit_.sequence, token(row), head);
    });
    for (int j = lane_; j < COLUMNS; j += 32) row_sums_.reference[j] = kNothingYet;
    Load(first);
  }

  // The position of a key in blocks.
  __device__ int InBlocks(int i) const {
    const DeviceSegment& segment = unit_.segment;
    return i < segment.first_key ? i : i + segment.end_key - segment.first_key;
  }

  // Starts the copies of a step's keys: a thread copies the same 16 bytes of keys a fixed number apart. Past the last
  // one some key is copied, which the mask leaves out.
  __device__ void Load(int step) {
    if (step >= end_) return;
    if (step >= block_steps_) {
      const int32_t* const keys = ranked_ + (step - block_steps_) * kProductRows;
      Copy(step, [&](int r) { return keys[r]; });
    } else {
      const int first = step * kProductRows;
      Copy(step, [&](int r) { return InBlocks(min(first + r, in_blocks_ - 1)); });
    }
  }

  template <typename Key>
  __device__ __forceinline__ void Copy(int step, Key&& key) {
    constexpr int kChunks = PANELS * 8, kAtOnce = kPanelThreads / kChunks; // of 16 bytes per key; keys
    const int piece = threadIdx.x % kChunks, first = threadIdx.x / kChunks, swizzle = piece % 8 ^ first % 8;
    const bool wanted = piece * 8 < p_.head_dim;
    const uint32_t to =
        SharedAddress(Stage(step)) + piece / 8 * (kProductRows * kPanelRowBytes) + first * kPanelRowBytes;
    const auto copy = [&](int i, const T* from) {
      const int row = i * kAtOnce;
      AsyncCopy16(to + row * kPanelRowBytes + (swizzle ^ row % 8) * 16, from, wanted);
    };
    const T* const base = first_key_ + (wanted ? piece * 8 : 0);
    if (p_.block_table == nullptr) {
      const int apart = static_cast<int>(p_.k.stride[1]);
#pragma unroll
      for (int i = 0; i < kProductRows / kAtOnce; ++i) copy(i, base + int64_t{key(first + i * kAtOnce)} * apart);
      return;
    }
#pragma unroll 4
    for (int i = 0; i < kProductRows / kAtOnce; ++i) {
      const int at = key(first + i * kAtOnce), index = args_.shape.by_page(at);
      copy(i, base + PageAt(p_, unit_.sequence.index, index) * p_.k.stride[0] +
                  (at - index * p_.page_size) * p_.k.stride[1]);
    }
  }

  __device__ char* Stage(int step) const {
    return memory_ + Memory::kRowBytes + step % Memory::kRingStages * Memory::kStageBytes;
  }

  // Multiplies the panel with the keys of steps [first, end). Leaves the logarithms of the warps' sums in shared
  // memory, for all to read.
  __device__ void Pass(int panel, int first, int end) {
    if (panels_ > 1) {
      end_ = end;
      Begin(panel, first);
    }
#pragma unroll 1
    for (int step = first; step < end; ++step) {
      AsyncCopyWaitAll();
      PRODUCT::Fence();
      __syncthreads(); // the step's keys are there, and all have done with the step before
      float d[COLUMNS / 2];
      if constexpr (Memory::kRingStages > 1) {
        PRODUCT::template Multiply<T, PANELS, COLUMNS>(d, Stage(step), memory_, [&] { Load(step + 1); });
      } else {
        PRODUCT::template Multiply<T, PANELS, COLUMNS>(d, Stage(step), memory_, [] {});
        __syncthreads();
        Load(step + 1);
      }
      Mask(step, d);
      row_sums_.Add(d, true, [](int, int) { return true; });
    }
    StoreLogSums(row_sums_, sm_.part[warp_], 1);
    __syncthreads();
  }

  // Scores that count for nothing: of keys that a row does not see, and of those that are not there.
  __device__ void Mask(int step, float (&d)[COLUMNS / 2]) const {
    const bool ranked = step >= block_steps_;
    const int first = (step - (ranked ? block_steps_ : 0)) * kProductRows, count = ranked ? unit_.kept : in_blocks_;
    if (ranked && first + kProductRows <= count) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first + 16 * warp_ + lane_ / 4 + 8 * half;
      const int position = i >= count ? std::numeric_limits<int>::max() : ranked ? -1 : InBlocks(i);
#pragma unroll
      for (int c = 0; c < COLUMNS / 8; ++c) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (position >= sm_.limit[8 * c + 2 * (lane_ % 4) + e]) d[4 * c + 2 * half + e] = -INFINITY;
        }
      }
    }
  }

  // Adds what a pass has summed up to the panel's rows. Returns, of this lane's rows, what it adds over what there was;
  // of the first pass nothing. All warps do the same, so that all know without another barrier; the first one writes.
  __device__ Ratios Join(int panel, bool is_first, int turn) {
    Ratios ratios{};
    float* const to = sums_ + turn * unit_.rows;
    const float* const from = sums_ + (turn ^ 1) * unit_.rows;
    for (int j = lane_; j < COLUMNS && panel * COLUMNS + j < unit_.rows; j += 32) {
      const int row = panel * COLUMNS + j;
      float part[kStopWarps], largest = -INFINITY, sum = 0;
#pragma unroll
      for (int w = 0; w < kStopWarps; ++w) largest = fmaxf(largest, part[w] = sm_.part[w][j]);
#pragma unroll
      for (int w = 0; w < kStopWarps; ++w) sum += largest == -INFINITY ? 0 : Exp2(part[w] - largest);
      const float added = largest == -INFINITY ? -INFINITY : __log2f(sum) + largest;
      const float had = is_first ? -INFINITY : from[row];
      if (!is_first && (had > -INFINITY || added > -INFINITY)) {
        ratios.sum += added == -INFINITY ? 0.f : Exp2(added - had);
        ++ratios.count;
      }
      if (warp_ == 0) to[row] = AddLogs(had, added);
    }
    return ratios;
  }

  const KeyStopArgs& args_;
  const Problem& p_;
  const StopUnit& unit_;
  const Memory layout_;
  char* const memory_; // the panel's rows; what comes after them
  StopShared<COLUMNS>& sm_;
  float* const sums_;     // [2, rows]: of each row so far, its logarithm; of the passes in turn
  int32_t* const ranked_; // the list's keys, the best first
  const T* first_key_;    // or the first page's
  const uint16_t* const codes_;
  int32_t* const list_;
  const int lane_, warp_;
  const int panels_, in_blocks_, block_steps_; // keys in blocks
  int end_;                                    // of the steps whose keys may be sent for
  RowSums<COLUMNS> row_sums_;
};

template <class PRODUCT, typename T, int PANELS, int COLUMNS>
__global__ void __launch_bounds__(kPanelThreads) StopKernel(const __grid_constant__ KeyStopArgs args) {
  extern __shared__ char raw[];
  const RankShape& a = args.shape;
  const int at = static_cast<int>(gridDim.x - 1 - blockIdx.x); // long lists first
  const int of_round = at >> a.log2_lists;
  const int in_slot = at - (of_round << a.log2_lists);
  RankSlot slot;
  if (!PlaceSlot(a, args.first_slot + of_round, slot) || in_slot >= slot.lists) return;
  int32_t* const list = args.lists + slot.ListRow(a, in_slot) * args.stride;
  StopUnit unit;
  unit.kept = list[0];
  if (unit.kept == 0) return; // nothing is ranked
  const int segment = slot.Segment(a, in_slot);
  unit.sequence = slot.sequence;
  unit.segment = SegmentAt(a, slot.sequence, segment);
  unit.kv = slot.kv;
  unit.head = (slot.kv * a.rules.units_per_kv + slot.first + in_slot - segment * a.rules.units_per_kv) * a.heads;
  unit.of_head = static_cast<int>(StopRows(args.stop_rows, unit.segment));
  unit.rows = unit.of_head * a.heads;
  const uint16_t* const codes = args.codes + int64_t{at} * args.code_stride;
  Stopper<PRODUCT, T, PANELS, COLUMNS> stopper(args, unit, AlignedPanels(raw), codes, list + 2);
  bool stopped;
  const int taken = stopper.Stop(&stopped);
  stopper.Keep(taken);
  if (threadIdx.x == 0) {
    list[0] = taken;
    list[1] = taken + (!stopped && taken < unit.segment.end_key - unit.segment.first_key ? 1 : 0);
  }
}

template <class PRODUCT, int PANELS, int COLUMNS>
int64_t StopBytes(int64_t rows, int64_t room) {
  return StopMemory<PRODUCT, PANELS, COLUMNS>(rows, room).Bytes() + kPanelAlign;
}

// With few rows per product: it can do with that.
template <class PRODUCT>
int64_t StopBytesOf(int head_dim, int64_t rows, int64_t room) {
  return head_dim <= 64    ? StopBytes<PRODUCT, 1, kFewRows>(rows, room)
         : head_dim <= 128 ? StopBytes<PRODUCT, 2, kFewRows>(rows, room)
                           : StopBytes<PRODUCT, 4, kFewRows>(rows, room);
}

template <class PRODUCT, typename T, int PANELS>
cudaError_t LaunchStopOf(const KeyStopArgs& args, cudaStream_t stream) {
  const RankShape& a = args.shape;
  const int64_t grid = int64_t{args.end_slot - args.first_slot} << a.log2_lists;
  if (grid == 0) return cudaSuccess;
  const int64_t rows = std::min<int64_t>(args.stop_rows, int64_t{a.segment_tiles} * a.rules.tile_tokens) * a.heads;
  const int64_t many = StopBytes<PRODUCT, PANELS, kManyRows>(rows, args.room);
  const bool few = rows <= kFewRows || many > args.shared_bytes;
  const auto kernel = few ? StopKernel<PRODUCT, T, PANELS, kFewRows> : StopKernel<PRODUCT, T, PANELS, kManyRows>;
  const int bytes = static_cast<int>(few ? StopBytes<PRODUCT, PANELS, kFewRows>(rows, args.room) : many);
  if (cudaError_t e = AllowSharedOnly(kernel, bytes)) return e;
  kernel<<<static_cast<unsigned>(grid), kPanelThreads, static_cast<size_t>(bytes), stream>>>(args);
  return cudaGetLastError();
}

template <class PRODUCT, typename T>
cudaError_t LaunchStopPanels(const KeyStopArgs& args, cudaStream_t stream) {
  const int head_dim = args.shape.d.p.head_dim;
  return head_dim <= 64    ? LaunchStopOf<PRODUCT, T, 1>(args, stream)
         : head_dim <= 128 ? LaunchStopOf<PRODUCT, T, 2>(args, stream)
                           : LaunchStopOf<PRODUCT, T, 4>(args, stream);
}

template <class PRODUCT>
cudaError_t LaunchStopWith(const KeyStopArgs& args, cudaStream_t stream) {
  return args.shape.d.p.q.dtype == FP_BF16 ? LaunchStopPanels<PRODUCT, __nv_bfloat16>(args, stream)
                                           : LaunchStopPanels<PRODUCT, __half>(args, stream);
}

} // namespace
} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_GATHER_STOP_CUH_
