// From chosen verticals and slashes to the mask: one warp per row, one lane per 32 blocks. Where a tile's first
// position is in block f, its block b is crossed by slashes f - b back: so the blocks of a row are a set of distances,
// read backwards. Forced blocks and dense tails join here, A-shape heads are ranges of bits, and the bits of a
// query-aware head's map stay.
#include "cuda/common/energies/keep.cuh"
#include "cuda/common/grid_control.cuh"
#include "cuda/common/vertical_slash/args.h"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Bits last, last - 1, .. of a set as bits 0, 1, .. of a word. There are none below 0.
__device__ inline uint32_t Backwards(const uint32_t* bits, int last) {
  if (last < 0) return 0;
  const uint32_t high = bits[last / 32], low = last >= 32 ? bits[last / 32 - 1] : 0;
  return __brev(__funnelshift_l(low, high, 31 - last % 32));
}

__global__ void __launch_bounds__(kThreads)
    VerticalSlashMaskKernel(const __grid_constant__ VerticalSlashMaskArgs args) {
  GridRelease(); // attend may take its place as soon as there is room
  const VerticalSlashShape& a = args.shape;
  const Problem& p = a.d.p;
  const TileRules& rules = a.rules;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  auto keeps_everything = [&](const DeviceSequence& s) { return args.keeps_everything || KeepsEverything(a, s); };
  if (args.fallback && thread < p.batch) {
    const DeviceSequence s = SequenceAt(a.d, static_cast<int>(thread));
    args.fallback[thread] = s.bad ? FP_BAD_SEQUENCE : keeps_everything(s) ? FP_FALLBACK_SHORT : FP_SELECTED;
  }
  if (args.attend_counter && thread == 0) *args.attend_counter = 0;
  const int64_t row = thread / 32;
  if (row >= int64_t{p.q_heads} * rules.tile_rows) return;
  const int head = static_cast<int>(row / rules.tile_rows), tile_row = static_cast<int>(row % rules.tile_rows);
  const DeviceSequence s =
      SequenceAt(a.d, SequenceOfSlot(p.batch, tile_row, [&](int b) { return TileBaseOf(a.d, rules, b); }));
  const int m = tile_row - s.TileBase(rules);
  if (m < 0 || m >= s.Tiles(rules)) return;

  const DeviceTile tile = TileAt(p, rules, s, m);
  const bool all = keeps_everything(s) || m >= FirstDenseTile(rules, s);
  const int own = args.table ? head : 0, size = rules.block_size;
  const int64_t index = s.index * p.q_heads + head;
  const bool has_bits = args.aware && !all && args.aware[index];
  const int first = s.prefix + tile.begin, last = s.prefix + tile.end - 1; // positions
  const int first_block = rules.by_block(first), last_block = rules.by_block(last);

  // Blocks [32 group, 32 group + 32) that distances cross.
  auto by_blocks = [&](int group) {
    const uint32_t* const distances = args.choice.slashes + index * args.choice.slash_words;
    uint32_t word = 0;
    for (int d = first_block - args.cover_both; d <= last_block; ++d) word |= Backwards(distances, d - 32 * group);
    return word;
  };
  auto by_tokens = [&](int group) {
    const uint32_t* const tokens = args.slash_tokens + index * args.token_words;
    auto crossed = [&](int b) {
      return AnyBit(tokens, max(0, first - min((b + 1) * size, s.k_len) + 1), last - b * size);
    };
    uint32_t word = 0;
    if (tile.end - tile.begin < kTileRows) { // the sequence's last tile
      for (int b = 32 * group; b < min(32 * group + 32, tile.visible); ++b) word |= uint32_t{crossed(b)} << (b % 32);
      return word;
    }
    const int phases = size / args.phase_step, phase = (first - first_block * size) / args.phase_step;
    word = Backwards(args.choice.slashes + (index * phases + phase) * args.choice.slash_words,
                     first_block + kCrossingsBefore - 32 * group);
    const int end = tile.visible - 1; // the last block may be short
    if (end / 32 == group && (end + 1) * size > s.k_len) {
      word = (word & ~(1u << (end % 32))) | uint32_t{crossed(end)} << (end % 32);
    }
    return word;
  };
  uint32_t* const bits = reinterpret_cast<uint32_t*>(args.bits + row * args.words);
  auto chosen = [&](int group) {
    if (args.pattern[own] == kGivenBits) return bits[group];
    if (args.pattern[own] == kAShape) {
      const int near = max(0, first - args.nearest[own] + 1) / size; // positions are below 2^30
      const int until = min(rules.by_block(min(args.first[own], 1 << 30) + size - 1), tile.visible);
      return RangeBits(0, until, 32 * group) | RangeBits(near, tile.visible, 32 * group);
    }
    const uint32_t columns = args.choice.verticals[index * 2 * args.choice.words + group];
    return columns | (args.slash_tokens ? by_tokens(group) : by_blocks(group));
  };

  int window = WindowBegin(rules, tile);
  if (args.window_ratio > 0) {
    const int64_t tokens = static_cast<int64_t>(ceil(args.window_ratio * s.k_len));
    window = min(window, rules.by_block(static_cast<int>(max(int64_t{0}, first - tokens + 1))));
  }
  int kept = 0;
  for (int group = threadIdx.x % 32; group < static_cast<int>(2 * args.words); group += 32) {
    uint32_t word = ~0u;
    const bool seen = 32 * group < tile.visible;
    if (!all && seen) {
      word = RangeBits(0, rules.sink_blocks, 32 * group) | RangeBits(window, tile.visible, 32 * group) | chosen(group);
      if (has_bits) word |= bits[group];
    }
    word &= RangeBits(0, tile.visible, 32 * group);
    bits[group] = word;
    kept += __popc(word);
  }
  kept = __reduce_add_sync(~0u, kept);
  if (args.counts && threadIdx.x % 32 == 0) args.counts[row] = kept;
}

} // namespace

cudaError_t LaunchVerticalSlashMask(const VerticalSlashMaskArgs& args, cudaStream_t stream) {
  const Problem& p = args.shape.d.p;
  const int64_t rows = int64_t{p.q_heads} * args.shape.rules.tile_rows;
  const int64_t grid = std::max(DivUp<int64_t>(rows, kWarps), DivUp<int64_t>(p.batch, kThreads));
  if (grid == 0) return cudaSuccess;
  VerticalSlashMaskKernel<<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

} // namespace flashprefill::cuda
