// What the launches of Gather's and S2O's selections read and write. Plain C++. docs/hopper-gather.md has the order of
// the launches.
//
// A *list* belongs to one mask head and segment. The mean queries of its heads, rounded up to a power of two with rows
// of zeros, are `columns` neighbouring columns of a product of keys with mean queries; kRankColumns / columns lists of
// one KV head and sequence are worked on together, a *slot*. Lists of a KV head are counted segment by segment, a
// segment's mask heads next to each other.
#ifndef FLASHPREFILL_CUDA_COMMON_GATHER_ARGS_H_
#define FLASHPREFILL_CUDA_COMMON_GATHER_ARGS_H_

#include <cuda_runtime_api.h>

#include "core/key_list.h"
#include "cuda/common/sequence.cuh"

namespace flashprefill::cuda {

constexpr int kRankColumns = 128; // mean queries per product
constexpr int kRankStep = 64;     // keys per product

// An energy as 16 bits: of the sum of its heads' squared shares, an fp32 number, the 7 lower bits of the exponent and
// the 9 upper ones of the fraction; 0 for less than 2^-118. Energies order as their codes do, but for 0.1 %. The upper
// 8 bits of a code are bins of half an octave of the sum, a quarter of an octave of energies.
constexpr int kCodeShift = 14, kCodeBase = 9 << 9;

struct RankShape {
  DeviceProblem d;
  TileRules rules;
  int segment_tiles, segment_rows;  // segment_rows: of the key lists, per mask head
  int heads, columns, log2_columns; // query heads per list; the same as a power of two
  int log2_lists;                   // of a slot
  int slots;                        // of a KV head, at most
  int chunk, chunks;                // keys that have a sum of their own, a multiple of kRankStep; of a sequence
  float exponent_scale;             // softmax_scale * log2(e)
  Divider by_segment_tokens, by_chunks, by_slots, by_page;
};

// Logarithms of the denominators of each mean query's softmax, by chunk of keys; and codes of energies.
struct RankArgs {
  RankShape shape;
  const void* rows; // mean queries [kv_heads, segment_rows, units_per_kv, columns, pitch]
  int pitch;
  float* lse;               // [kv_heads * slots, chunks, kRankColumns]
  int first_slot, end_slot; // of all KV heads': those that are worked on
  int chunk;                // keys per CTA: the shape's for sums, any multiple of kRankStep for codes
  uint16_t* codes;          // [slots of the round, lists of a slot, code_stride]: of keys from 0 on
  int64_t code_stride;
};
cudaError_t LaunchRankSumsSm90(const RankArgs& args, cudaStream_t stream);
cudaError_t LaunchRankSumsPortable(const RankArgs& args, cudaStream_t stream);
cudaError_t LaunchRankCodesSm90(const RankArgs& args, cudaStream_t stream);
cudaError_t LaunchRankCodesPortable(const RankArgs& args, cudaStream_t stream);

// From codes to lists, of a round's slots.
struct KeyChoiceArgs {
  RankShape shape;
  int first_slot, end_slot;
  const uint16_t* codes;
  int64_t code_stride;
  float gain;                       // of the policy over kGainKeys; NaN: by budget
  double budget;                    // share of the ranked keys
  int32_t* lists;                   // fp_block_mask's key_lists
  int64_t stride;                   // of a list
  int room;                         // keys
  int table_steps, most_candidates; // set by the launch
};
cudaError_t LaunchKeyChoice(KeyChoiceArgs args, cudaStream_t stream);

// S2O: from lists of the best keys, in ascending order, to those that are taken before rows say stop.
struct KeyStopArgs : KeyChoiceArgs {
  float tau;
  int stop_rows;    // of a head
  int shared_bytes; // that a CTA may have
};
constexpr int kMostStopRows = 1024;          // of a list
constexpr int64_t kMostRankedKeys = 1 << 24; // of a sequence
constexpr int64_t kMostKeyStride = 1 << 30;  // elements
cudaError_t LaunchKeyStopSm90(const KeyStopArgs& args, cudaStream_t stream);
// Shared memory that lists with so many rows and room for so many keys take at least.
int64_t KeyStopBytesSm90(int head_dim, int64_t rows, int64_t room);

// Bits of blocks, counts with the lists' keys, fallbacks.
struct ListMaskArgs {
  RankShape shape;
  uint64_t* bits;
  int64_t words;
  int32_t* counts;   // or null
  int32_t* fallback; // or null
  const int32_t* lists;
  int64_t stride;
  int mask_heads;
  int* attend_counter; // set to zero for an attend that follows; or null
};
cudaError_t LaunchListMask(const ListMaskArgs& args, cudaStream_t stream);

// Empties all lists of a mask. Nothing where it has none.
cudaError_t LaunchEmptyLists(const BlockMask& mask, cudaStream_t stream);

#ifdef __CUDACC__

// A segment of a sequence, as core/segment.h has it.
struct DeviceSegment {
  int first_tile, begin, end; // query tokens
  int window;                 // block from which on all are kept
  int first_key, end_key;     // keys that are ranked
  int seen;                   // keys that its last row sees
};

__device__ inline DeviceSegment SegmentAt(const RankShape& a, const DeviceSequence& s, int i) {
  const TileRules& r = a.rules;
  DeviceSegment segment;
  segment.first_tile = i * a.segment_tiles;
  const DeviceTile first = TileAt(a.d.p, r, s, segment.first_tile);
  segment.begin = first.begin;
  segment.end = ClampTo(int64_t{first.begin} + int64_t{a.segment_tiles} * r.tile_tokens, int64_t{s.q_len});
  segment.window = max(0, WindowBegin(r, first));
  segment.end_key = segment.window * r.block_size;
  segment.first_key = ClampTo(int64_t{r.sink_blocks} * r.block_size, int64_t{segment.end_key});
  if (segment.first_tile >= FirstDenseTile(r, s)) segment.first_key = segment.end_key;
  segment.seen = s.prefix + segment.end;
  return segment;
}

__device__ inline int CodeOf(float squares) { // from 0 to below 2^10
  return max((__float_as_int(squares) >> kCodeShift) - kCodeBase, 0);
}
// The middle of a code's sums of squares.
__device__ inline float SquaresOf(int code) {
  return __int_as_float((code << kCodeShift) + (kCodeBase << kCodeShift | 1 << (kCodeShift - 1)));
}
__device__ inline float SquareRoot(float x) { // one instruction
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The energy. inverse_heads: 1 / query heads of the list.
__device__ inline float EnergyOf(int code, float inverse_heads) { return sqrtf(SquaresOf(code) * inverse_heads); }

__device__ inline int SegmentsOf(const RankShape& a, const DeviceSequence& s) {
  return a.by_segment_tokens(s.q_len + a.segment_tiles * a.rules.tile_tokens - 1);
}

// First row of a sequence's segments in key_lists.
__device__ inline int SegmentBaseOf(const RankShape& a, int b) { return a.by_segment_tokens(QueryBegin(a.d.p, b)) + b; }

// The lists of a slot.
struct RankSlot {
  DeviceSequence sequence;
  int kv;
  int slot;         // of all KV heads
  int first, lists; // of the sequence's lists of the KV head; how many

  __device__ int Segment(const RankShape& a, int list) const { return a.rules.by_units(first + list); }
  // The row of a list among the mean queries' lists, and in key_lists.
  __device__ int64_t RowOf(const RankShape& a, int list) const {
    return (int64_t{kv} * a.segment_rows + SegmentBaseOf(a, sequence.index)) * a.rules.units_per_kv + first + list;
  }
  __device__ int64_t ListRow(const RankShape& a, int list) const {
    const int segment = Segment(a, list), unit = first + list - segment * a.rules.units_per_kv;
    return (int64_t{kv} * a.rules.units_per_kv + unit) * a.segment_rows + SegmentBaseOf(a, sequence.index) + segment;
  }
};

// False if there are no lists.
__device__ inline bool PlaceSlot(const RankShape& a, int slot, RankSlot& at) {
  const int units = a.rules.units_per_kv;
  at.slot = slot;
  at.kv = a.by_slots(slot);
  const int in_head = slot - at.kv * a.slots;
  const auto base = [&](int b) { return (SegmentBaseOf(a, b) * units >> a.log2_lists) + b; };
  const int b = SequenceOfSlot(a.d.p.batch, in_head, base);
  at.sequence = SequenceAt(a.d, b);
  at.first = (in_head - base(b)) << a.log2_lists;
  at.lists = min(1 << a.log2_lists, SegmentsOf(a, at.sequence) * units - at.first);
  return in_head >= base(b) && at.lists > 0;
}

#endif // __CUDACC__

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_GATHER_ARGS_H_
