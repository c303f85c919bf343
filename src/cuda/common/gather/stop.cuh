// S2O's second step: a CTA of one warpgroup has the list of one mask head and segment, whose best keys choose.cu has
// found. It sorts them, and takes them 128 at a time until what they add to a few rows is little, twice in a row.
//
// Keys are sorted by a bitonic network in shared memory: a word has a key's code in its upper half and below it the
// complement of its place in the list, so that equal energies come by index. Then the rows' sums of exponentials: first
// over the keys in their blocks, which are neighbours, then over groups of ranked keys, which are gathered; 64 keys by
// 64 rows per product (key_product.cuh has the sums). Each step's keys come while the step before is multiplied. A
// row's sum is kept as its logarithm, so references of warps need not agree. With more than 64 rows each panel of rows
// meets all keys of a group in turn. Every sum has one order, whatever else runs: no atomics.
#ifndef FLASHPREFILL_CUDA_COMMON_GATHER_STOP_CUH_
#define FLASHPREFILL_CUDA_COMMON_GATHER_STOP_CUH_

#include "core/stop_rows.h"
#include "cuda/common/gather/args.h"
#include "cuda/common/key_product.cuh"
#include "cuda/common/launch.h"

namespace flashprefill::cuda {
namespace {

constexpr int kStopColumns = 64; // rows per product
constexpr int kStopWarps = kPanelThreads / 32;

struct StopShared {
  float reference[kStopWarps][kStopColumns];
  float part[kStopWarps][kStopColumns]; // logarithms of a pass's sums, by warp
  float sum[kMostStopRows];             // of each row so far, its logarithm
  int limit[kStopColumns];              // of the panel's rows: how many keys they see
  float ratios[2];
  int counted[2];
  int scan[2][kStopWarps];
};

// What the CTA works on.
struct StopUnit {
  DeviceSequence sequence;
  DeviceSegment segment;
  int kv, head;   // first query head of the list
  int of_head;    // rows of a head that decide
  int rows, kept; // rows of all heads; keys of the list
};

template <class PRODUCT, typename T, int PANELS>
class Stopper {
 public:
  static constexpr int kRowBytes = kPanelBytes<PANELS, kStopColumns>, kStageBytes = kPanelBytes<PANELS, kProductRows>;
  static constexpr int kBytes = kRowBytes + 2 * kStageBytes;

  __device__ Stopper(const KeyStopArgs& args, const StopUnit& unit, char* memory, StopShared& shared,
                     const uint16_t* codes, int32_t* keys, uint32_t* words)
      : args_(args),
        p_(args.shape.d.p),
        unit_(unit),
        memory_(memory),
        sm_(shared),
        codes_(codes),
        keys_(keys),
        words_(words),
        lane_(threadIdx.x % 32),
        warp_(__shfl_sync(~0u, threadIdx.x / 32, 0)) {}

  // Returns how many keys are taken, and whether rows said so.
  __device__ int Stop(bool* stopped) {
    Sort();
    for (int r = threadIdx.x; r < unit_.rows; r += kPanelThreads) sm_.sum[r] = -INFINITY;
    __syncthreads();
    for (int panel = 0; panel * kStopColumns < unit_.rows; ++panel) {
      LoadRows(panel);
      const DeviceSegment& segment = unit_.segment;
      AddBlocks(panel, 0, segment.first_key);
      AddBlocks(panel, segment.end_key, segment.seen);
    }
    int below = 0;
    *stopped = false;
    for (int first = 0; first < unit_.kept; first += kGroupKeys) {
      const int count = min(static_cast<int>(kGroupKeys), unit_.kept - first);
      below = AddGroup(first, count) < args_.tau ? below + 1 : 0;
      if (below == kGroupsBelow) {
        *stopped = true;
        return first + count;
      }
    }
    return unit_.kept;
  }

  // Leaves the best `count` keys of the list, in their order.
  __device__ void Keep(int count) {
    if (count == unit_.kept) return;
    const uint32_t least = words_[count - 1];
    int before = 0, turn = 0;
    for (int first = 0; first < unit_.kept; first += kPanelThreads) {
      const int i = first + static_cast<int>(threadIdx.x);
      const int key = i < unit_.kept ? keys_[i] : 0;
      const bool in = i < unit_.kept && WordOf(i, key) >= least;
      const uint32_t votes = __ballot_sync(~0u, in);
      turn ^= 1; // the other counts may still be read
      if (lane_ == 0) sm_.scan[turn][warp_] = __popc(votes);
      __syncthreads(); // all have read their keys
      int at = before + __popc(votes & ((1u << lane_) - 1));
#pragma unroll
      for (int w = 0; w < kStopWarps; ++w) {
        const int its = sm_.scan[turn][w];
        at += w < warp_ ? its : 0;
        before += its;
      }
      if (in) keys_[at] = key;
    }
  }

 private:
  __device__ uint32_t WordOf(int i, int key) const {
    return static_cast<uint32_t>(codes_[key]) << 16 | static_cast<uint32_t>(0xffff - i);
  }

  __device__ void Sort() {
    int n = 2;
    while (n < unit_.kept) n *= 2;
    for (int i = threadIdx.x; i < n; i += kPanelThreads) words_[i] = i < unit_.kept ? WordOf(i, keys_[i]) : 0;
    __syncthreads();
    for (int size = 2; size <= n; size *= 2) {
      for (int apart = size / 2; apart > 0; apart /= 2) {
        for (int pair = threadIdx.x; pair < n / 2; pair += kPanelThreads) {
          const int low = 2 * pair - (pair & (apart - 1)), high = low + apart;
          const uint32_t a = words_[low], b = words_[high];
          if ((a < b) == ((low & size) == 0)) { // the largest first
            words_[low] = b;
            words_[high] = a;
          }
        }
        __syncthreads();
      }
    }
  }

  // ---------------------------------------------------------------- products

  // A panel's rows into shared memory; rows that are not there are zeros.
  __device__ void LoadRows(int panel) {
    __syncthreads(); // the last product is done with the rows before
    const int heads = args_.shape.heads;
    const auto token = [&](int row) { return static_cast<int>(StopRow(unit_.segment, row / heads, unit_.of_head)); };
    if (threadIdx.x < kStopColumns) {
      const int row = panel * kStopColumns + threadIdx.x;
      sm_.limit[threadIdx.x] = row < unit_.rows ? unit_.sequence.prefix + token(row) + 1 : 0;
    }
    CopyRows<PANELS, kStopColumns>(memory_, p_.head_dim, p_.q.data, [&](int j) -> const T* {
      const int row = panel * kStopColumns + j;
      if (row >= unit_.rows) return nullptr;
      const int head = unit_.head + row % heads;
      return static_cast<const T*>(p_.q.data) + RowOffsetAt(p_, p_.q.stride, unit_.sequence, token(row), head);
    });
  }

  // Multiplies the panel with keys [0, count), of which key(i) is the i-th; each row counts those that sees(row, i)
  // says. Leaves the logarithms of the warps' sums in shared memory, for all to read.
  template <typename Key, typename Sees>
  __device__ void Add(int count, Key&& key, bool all_see, Sees&& sees) {
    RowSums<kStopColumns> sums{sm_.reference[warp_], args_.shape.exponent_scale};
    sums.Start();
    const auto load = [&](int step) {
      if (step * kProductRows >= count) return;
      CopyRows<PANELS, kProductRows>(
          memory_ + kRowBytes + step % 2 * kStageBytes, p_.head_dim, p_.k.data, [&](int r) -> const T* {
            const int i = step * kProductRows + r;
            if (i >= count) return nullptr;
            return static_cast<const T*>(p_.k.data) + KeyOffsetAt(p_, p_.k.stride, unit_.sequence, key(i), unit_.kv);
          });
    };
    load(0);
#pragma unroll 1
    for (int step = 0; step * kProductRows < count; ++step) {
      AsyncCopyWaitAll();
      PRODUCT::Fence();
      __syncthreads(); // the step's keys are there, and all have done with the step before
      float d[kStopColumns / 2];
      PRODUCT::template Multiply<T, PANELS, kStopColumns>(d, memory_ + kRowBytes + step % 2 * kStageBytes, memory_,
                                                          [&] { load(step + 1); });
      const int first = step * kProductRows, mine = first + 16 * warp_ + lane_ / 4;
      sums.Add(d, all_see && first + kProductRows <= count, [&](int j, int half) {
        const int i = mine + 8 * half;
        return i < count && sees(j, i);
      });
    }
    StoreLogSums(sums, sm_.part[warp_], 1);
    __syncthreads();
  }

  // A row's logarithm of what the last pass has summed up.
  __device__ float Passed(int column) const {
    float log = sm_.part[0][column];
#pragma unroll
    for (int w = 1; w < kStopWarps; ++w) log = AddLogs(log, sm_.part[w][column]);
    return log;
  }

  // Adds keys [begin, end) to the panel's rows, as far as these see them.
  __device__ void AddBlocks(int panel, int begin, int end) {
    if (begin >= end) return;
    Add(
        end - begin, [&](int i) { return begin + i; }, false, [&](int j, int i) { return begin + i < sm_.limit[j]; });
    const int row = panel * kStopColumns + threadIdx.x;
    if (threadIdx.x < kStopColumns && row < unit_.rows) sm_.sum[row] = AddLogs(sm_.sum[row], Passed(threadIdx.x));
    __syncthreads(); // the parts are read
  }

  // Adds a group of ranked keys to all rows. Returns the mean of what it adds over what there was.
  __device__ float AddGroup(int first, int count) {
    float ratios = 0;
    int counted = 0;
    for (int panel = 0; panel * kStopColumns < unit_.rows; ++panel) {
      if (unit_.rows > kStopColumns) LoadRows(panel); // else they are there
      Add(
          count, [&](int i) { return keys_[0xffff - (words_[first + i] & 0xffff)]; }, true,
          [](int, int) { return true; });
      const int row = panel * kStopColumns + threadIdx.x;
      if (threadIdx.x < kStopColumns && row < unit_.rows) {
        const float had = sm_.sum[row], added = Passed(threadIdx.x);
        if (had > -INFINITY || added > -INFINITY) {
          ratios += added == -INFINITY ? 0.f : Exp2(added - had);
          ++counted;
        }
        sm_.sum[row] = AddLogs(had, added);
      }
    }
    if (warp_ < 2) {
      ratios = WarpSum(ratios);
      counted = __reduce_add_sync(~0u, counted);
      if (lane_ == 0) sm_.ratios[warp_] = ratios, sm_.counted[warp_] = counted;
    }
    __syncthreads();
    const int all = sm_.counted[0] + sm_.counted[1];
    return all == 0 ? 0.f : (sm_.ratios[0] + sm_.ratios[1]) / static_cast<float>(all);
  }

  const KeyStopArgs& args_;
  const Problem& p_;
  const StopUnit& unit_;
  char* const memory_; // the panel's rows, and two stages of keys
  StopShared& sm_;
  const uint16_t* const codes_;
  int32_t* const keys_;
  uint32_t* const words_; // of the list's keys, the best first
  const int lane_, warp_;
};

template <class PRODUCT, typename T, int PANELS>
__global__ void __launch_bounds__(kPanelThreads) StopKernel(const __grid_constant__ KeyStopArgs args) {
  using Its = Stopper<PRODUCT, T, PANELS>;
  extern __shared__ char raw[];
  char* const memory = AlignedPanels(raw);
  StopShared& shared = *reinterpret_cast<StopShared*>(memory + Its::kBytes);
  const RankShape& a = args.shape;
  const int of_round = static_cast<int>(blockIdx.x) >> a.log2_lists;
  const int in_slot = static_cast<int>(blockIdx.x) - (of_round << a.log2_lists);
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
  const uint16_t* const codes = args.codes + int64_t{blockIdx.x} * args.code_stride;
  Its its(args, unit, memory, shared, codes, list + 2, reinterpret_cast<uint32_t*>(&shared + 1));
  bool stopped;
  const int taken = its.Stop(&stopped);
  its.Keep(taken);
  if (threadIdx.x == 0) {
    list[0] = taken;
    list[1] = taken + (!stopped && taken < unit.segment.end_key - unit.segment.first_key ? 1 : 0);
  }
}

template <class PRODUCT, typename T, int PANELS>
cudaError_t LaunchStopOf(const KeyStopArgs& args, cudaStream_t stream) {
  const int64_t grid = int64_t{args.end_slot - args.first_slot} << args.shape.log2_lists;
  if (grid == 0) return cudaSuccess;
  int words = 2;
  while (words < args.room) words *= 2;
  const int bytes =
      Stopper<PRODUCT, T, PANELS>::kBytes + static_cast<int>(sizeof(StopShared)) + words * 4 + kPanelAlign;
  const auto kernel = StopKernel<PRODUCT, T, PANELS>;
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
