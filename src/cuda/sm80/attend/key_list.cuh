// Which keys a query tile gets, in the portable kernel. The warps write the kept blocks of 2048 as a list into shared
// memory, from the diagonal down, so that a step's keys are a look into the list and not a walk over bits that a dozen
// registers follow. After them come, with mean correction, the means of blocks that were left out; or
// the keys of the segment's list, which are read where they lie.
//
// A step is kKeys rows, and a row's place is an offset: a thread or two per row, for K and for V, find it three steps
// before it is used, whatever the layout, the block size and the pages are, and ask for the page number a step earlier
// still. So there is one way to load. A row that isn't there reads as zeros, and is masked.
#ifndef FLASHPREFILL_CUDA_SM80_ATTEND_KEY_LIST_CUH_
#define FLASHPREFILL_CUDA_SM80_ATTEND_KEY_LIST_CUH_

#include "cuda/common/attend/tile_list.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/sm80/attend/params.h"

namespace flashprefill::cuda {

constexpr uint32_t kNowhere = ~0u;

struct StepControl {
  int masked; // some key is not seen by all rows
  int means;  // columns are means of blocks
  int block;  // the first one's
};

enum class ListOf : int { kBlocks = 0, kMeans = 1, kKeys = 2 };

// The list, as all threads know it: in shared memory, to spare registers.
struct ListState {
  int group;   // of the mask's words
  ListOf what; // its entries are: kept blocks, tiles of means, keys of the segment's list
  int steps;   // that it takes
  int missing; // chunks that the first step goes short
  int skipped; // chunks of the first block that no row sees
};

template <class SHAPE>
struct ListControl {
  uint32_t offset[2][kStepRing][SHAPE::kKeys]; // of K's rows and V's, in 16 bytes; in the order of PlaceOfRow
  int position[kStepRing][SHAPE::kKeys];       // of keys; of means, 0 if they count; else kAbsent
  StepControl step[kStepRing];
  uint16_t list[kListBlocks];
  ListState state;
  TileList listed;
  const void* base[2]; // of K and V, where offsets count from
  Work work;
  int next_item, tiles_of_batch; // of the warp that takes tiles
};

template <class SHAPE>
class KeyList {
  static constexpr int kKeys = SHAPE::kKeys;

 public:
  // Rows that a thread copies lie next to each other: pass i of the copies takes row r + i * kRowsPerPass.
  static constexpr int kRowsPerPass = SHAPE::kThreads / 8, kPasses = kKeys / kRowsPerPass;
  static __device__ __forceinline__ int PlaceOfRow(int row) {
    return row % kRowsPerPass * kPasses + row / kRowsPerPass;
  }

  __device__ __forceinline__ KeyList(const PortableAttendParams& p, ListControl<SHAPE>& control) : p_(p), c_(control) {}

  // Groups of 2048 blocks that the tile sees; one where it sees nothing, since rows of zeros are written too.
  __device__ __forceinline__ int Groups() const { return max(1, (c_.work.visible + kListBlocks - 1) / kListBlocks); }

  // How many lists the tile has, one after another.
  __device__ __forceinline__ int Lists() const {
    const int groups = Groups();
    return p_.mean_correction ? 2 * groups : groups + (c_.listed.end > 0 ? 1 : 0);
  }

  // Makes the i-th one. All threads, between two barriers.
  __device__ __forceinline__ void List(int i) {
    const int groups = Groups();
    if (i < groups) {
      ListKeys(groups - 1 - i);
    } else if (p_.mean_correction) {
      ListMeans(2 * groups - 1 - i);
    } else if (threadIdx.x == 0) {
      c_.state = ListState{0, ListOf::kKeys, (c_.listed.end + kKeys - 1) / kKeys, 0, 0};
    }
  }

  // Lists the kept blocks of a group. All threads, between two barriers.
  __device__ __forceinline__ void ListKeys(int group) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint64_t word = MaskWord(p_, c_.work, group * 32 + lane);
    const int own = __popcll(word);
    int sum = own; // of this lane and those above
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int above = __shfl_down_sync(~0u, sum, d);
      if (lane + d < 32) sum += above;
    }
    const int kept = __shfl_sync(~0u, sum, 0), top_lane = 31 - __clz(__ballot_sync(~0u, word != 0));
    const int top = 63 - __clzll(__shfl_sync(~0u, word, max(0, top_lane)));
    if (threadIdx.x == 0) c_.state = StateOf(group, kept, (group * 32 + top_lane) * 64 + top);
    sum -= own;
#pragma unroll 1
    for (int w = warp; w < 32; w += SHAPE::kWarps) {
      const uint64_t bits = __shfl_sync(~0u, word, w);
      const int before = __shfl_sync(~0u, sum, w);
      if (bits == 0) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int bit = 32 * half + lane;
        if (bits >> bit & 1) c_.list[before + __popcll(bits >> bit >> 1)] = static_cast<uint16_t>(w * 64 + bit);
      }
    }
    SetBase(false);
  }

  // Lists the tiles of kKeys means of a group of which some count.
  __device__ __forceinline__ void ListMeans(int group) {
    const int lane = threadIdx.x % 32;
    const uint64_t word = LeftOut(group * 32 + lane);
    constexpr int kTilesPerWord = kKeys < 64 ? 64 / kKeys : 1, kWordsPerTile = kKeys > 64 ? kKeys / 64 : 1;
    uint32_t any[kTilesPerWord];
    int entries = 0;
    int above = 0; // tiles of higher words
#pragma unroll
    for (int i = 0; i < kTilesPerWord; ++i) {
      any[i] = __ballot_sync(~0u, kTilesPerWord == 1 ? word != 0 : static_cast<uint32_t>(word >> 32 * i) != 0);
      if (kWordsPerTile == 2) any[i] = (any[i] | any[i] >> 1) & 0x55555555u; // at the tile's lower word
      entries += __popc(any[i]);
      above += __popc(any[i] >> lane >> 1);
    }
    if (threadIdx.x == 0) c_.state = ListState{group, ListOf::kMeans, entries, 0, 0};
    if (threadIdx.x < 32) {
#pragma unroll
      for (int i = kTilesPerWord - 1; i >= 0; --i) {
        if (any[i] >> lane & 1) c_.list[above++] = static_cast<uint16_t>(lane * kTilesPerWord / kWordsPerTile + i);
      }
    }
    SetBase(true);
  }

  // This thread's row of a step, and what it must ask memory for: the page's number, or whether the mean counts.
  struct Row {
    int position, asked;
  };
  static constexpr bool kOneForBoth = SHAPE::kThreads < 2 * kKeys; // a thread's row is K's and V's
  static __device__ __forceinline__ bool Places() { return threadIdx.x < (kOneForBoth ? kKeys : 2 * kKeys); }

  __device__ __forceinline__ Row Ask(int step) const {
    const int row = threadIdx.x % kKeys;
    const Work& w = c_.work;
    const ListState& list = c_.state;
    Row r{kAbsent, 0};
    if (list.what == ListOf::kKeys) {
      AskForListed(step * kKeys + row, r);
      return r;
    }
    if (list.what == ListOf::kMeans) {
      r.position = list.group * kListBlocks + c_.list[step] * kKeys + row;
      r.asked = static_cast<int>(LeftOut(r.position >> 6) >> (r.position & 63) & 1);
      return r;
    }
    const int per_step = kKeys >> p_.chunk_shift;
    int chunk = step * per_step + per_step - 1 - (row >> p_.chunk_shift) - list.missing;
    if (chunk < 0) return r;
    chunk += list.skipped;
    const int entry = p_.by_chunks(chunk), sub = p_.chunks_per_block - 1 - (chunk - entry * p_.chunks_per_block);
    const int position = (list.group * kListBlocks + c_.list[entry]) * p_.block_size + (sub << p_.chunk_shift) +
                         (row & ((1 << p_.chunk_shift) - 1));
    if (position >= w.k_len) return r;
    r.position = position;
    if (p_.page_size) r.asked = PageOf(position);
    return r;
  }

  // Writes what Ask has got, and whether the step needs a mask.
  __device__ __forceinline__ void Tell(int step, Row r) const {
    const int row = threadIdx.x % kKeys, slot = step % kStepRing;
    const bool is_v = !kOneForBoth && threadIdx.x >= kKeys, means = c_.state.what == ListOf::kMeans;
    const bool listed = c_.state.what == ListOf::kKeys;
    if (listed && static_cast<uint32_t>(r.position) >= static_cast<uint32_t>(Trusted(step))) r.position = kAbsent;
    const auto offset_of = [&](const uint32_t* units) {
      if (means) return r.asked ? r.position * static_cast<uint32_t>(p_.mean_stride[1] / 8) : kNowhere;
      if (r.position == kAbsent) return kNowhere;
      if (!p_.page_size) return r.position * units[1];
      const int page = ClampTo(r.asked, p_.page_count - 1);
      return page * units[0] + (r.position - p_.by_page(r.position) * p_.page_size) * units[1];
    };
    c_.offset[is_v][slot][PlaceOfRow(row)] = offset_of(is_v ? p_.v_units : p_.k_units);
    if (kOneForBoth) c_.offset[1][slot][PlaceOfRow(row)] = offset_of(p_.v_units);
    if (is_v) return;
    c_.position[slot][row] = !means ? r.position : r.asked ? 0 : kAbsent;
    if (threadIdx.x == 0) {
      // Keys below `safe` are seen by every row. A step is not masked if its highest chunk ends below it; the first
      // step of a list may lack chunks.
      const int safe = min(c_.work.first_position + 1, c_.work.k_len);
      const bool masked = listed ? !AllSee(step) : step == 0 || HighestOf(step) >= safe;
      c_.step[slot] = StepControl{masked, means, r.position};
    }
  }

 private:
  // The i-th key of the segment's list. Nothing waits for its number here but what it leads to: a page, or the bit of
  // its block.
  __device__ __forceinline__ void AskForListed(int i, Row& r) const {
    const TileList& list = c_.listed;
    if (i >= list.end) return;
    r.position = __ldg(list.keys + i);
    if (!list.check && !p_.page_size) return;
    const int position = ClampTo(r.position, c_.work.k_len - 1), block = p_.by_block(position);
    if (p_.page_size) r.asked = PageOf(position);
    if (list.check && block < c_.work.visible) {
      const uint64_t word = __ldg(p_.bits + c_.work.mask_row * p_.words + block / 64);
      if (word >> block % 64 & 1) r.position = kAbsent;
    }
  }

  // Whether all rows see all keys of a step of listed ones.
  __device__ __forceinline__ bool AllSee(int step) const {
    return !c_.listed.check && (step + 1) * kKeys <= c_.listed.safe;
  }

  // Past the last key that such a step can have, whatever the list says.
  __device__ __forceinline__ int Trusted(int step) const {
    return AllSee(step) ? min(c_.work.first_position + 1, c_.work.k_len) : c_.work.k_len;
  }

  __device__ __forceinline__ int PageOf(int position) const {
    const int column = min(p_.by_page(position), p_.pages_per_seq - 1);
    return __ldg(p_.block_table + c_.work.sequence * p_.block_table_stride + column);
  }

  // The last position of a step of keys, but the first, which may lack chunks.
  __device__ __forceinline__ int HighestOf(int step) const {
    const ListState& list = c_.state;
    if (list.what == ListOf::kMeans) return 0;
    const int chunk = step * (kKeys >> p_.chunk_shift) - list.missing + list.skipped;
    const int entry = p_.by_chunks(chunk), sub = p_.chunks_per_block - (chunk - entry * p_.chunks_per_block);
    return (list.group * kListBlocks + c_.list[entry]) * p_.block_size + (sub << p_.chunk_shift) - 1;
  }

  // A list of kept blocks, of which `first` is the highest. Chunks of a tile's last block that no row sees are left
  // out.
  __device__ __forceinline__ ListState StateOf(int group, int kept, int first) const {
    if (kept == 0) return ListState{group, ListOf::kBlocks, 0, 0, 0};
    int skipped = 0;
    if (first == c_.work.visible - 1) {
      const int seen = VisibleKeys(p_, c_.work) - first * p_.block_size;
      skipped = p_.chunks_per_block - ((seen + (1 << p_.chunk_shift) - 1) >> p_.chunk_shift);
    }
    const int chunks = kept * p_.chunks_per_block - skipped, per_step = kKeys >> p_.chunk_shift;
    const int steps = (chunks + per_step - 1) / per_step;
    // The first step has a mask anyway.
    return ListState{group, ListOf::kBlocks, steps, steps * per_step - chunks, skipped};
  }

  // Bits of blocks that were left out and that every row sees whole.
  __device__ __forceinline__ uint64_t LeftOut(int index) const {
    const int left = c_.work.full - index * 64;
    if (left <= 0) return 0;
    const uint64_t word = ~MaskWord(p_, c_.work, index);
    return left >= 64 ? word : word & ((uint64_t{1} << left) - 1);
  }

  // Where offsets count from: the sequence's first key or mean, or the cache's first page.
  __device__ __forceinline__ void SetBase(bool means) const {
    if (threadIdx.x >= 2) return;
    const bool is_v = threadIdx.x == 1;
    const Work& w = c_.work;
    const auto* data = static_cast<const uint16_t*>(is_v ? p_.v_data : p_.k_data);
    const int64_t* const stride = is_v ? p_.v_stride : p_.k_stride;
    if (means) {
      const bool packed = p_.cu_seqlens_k && !p_.page_size;
      const int row = packed ? p_.by_block(w.k_begin) + w.sequence : w.sequence * p_.mean_rows_each;
      data = static_cast<const uint16_t*>(is_v ? p_.v_mean_data : p_.k_mean_data) + w.kv_head * p_.mean_stride[2] +
             row * p_.mean_stride[1];
    } else {
      data += w.kv_head * stride[2];
      if (!p_.page_size) data += w.sequence * stride[0] + w.k_begin * stride[1];
    }
    c_.base[is_v] = data;
  }

  const PortableAttendParams& p_;
  ListControl<SHAPE>& c_;
};

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM80_ATTEND_KEY_LIST_CUH_
