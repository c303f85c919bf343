// The rest of a mask with key lists, when these are there: bits of the sink, of the window before a tile's segment and
// of all from there on, a warp for each row of the mask; counts, to which a list adds its keys as blocks; and the
// reason of each sequence by the first warps.
#include "cuda/common/energies/keep.cuh"
#include "cuda/common/gather/args.h"
#include "cuda/common/grid_control.cuh"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

__global__ void __launch_bounds__(kThreads) ListMaskKernel(const __grid_constant__ ListMaskArgs args) {
  GridRelease(); // attend may take its place as soon as there is room
  const RankShape& a = args.shape;
  const Problem& p = a.d.p;
  const TileRules& r = a.rules;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (args.fallback && thread < p.batch) {
    args.fallback[thread] = FallbackOf(a.d, r, SequenceAt(a.d, static_cast<int>(thread)));
  }
  if (args.attend_counter && thread == 0) *args.attend_counter = 0;
  const int64_t row = thread / 32;
  if (row >= int64_t{args.mask_heads} * r.tile_rows) return;
  const int head = static_cast<int>(row / r.tile_rows), tile_row = static_cast<int>(row - int64_t{head} * r.tile_rows);
  const DeviceSequence s =
      SequenceAt(a.d, SequenceOfSlot(p.batch, tile_row, [&](int b) { return TileBaseOf(a.d, r, b); }));
  const int m = tile_row - s.TileBase(r);
  if (m < 0 || m >= s.Tiles(r)) return;
  const DeviceTile tile = TileAt(p, r, s, m);
  const int i = m / a.segment_tiles;
  MaskRow what{0, tile.visible, r.sink_blocks, SegmentAt(a, s, i).window};
  const bool whole =
      r.keeps_everything || s.k_len <= r.dense_up_to_keys || m >= FirstDenseTile(r, s) || KeepsEverything(p, r, s);
  if (whole) what.sink = tile.visible;
  int kept =
      WriteMaskRow<false, float>(KeepRule{}, what, nullptr, reinterpret_cast<uint32_t*>(args.bits + row * args.words),
                                 static_cast<int>(2 * args.words), 0, 0);
  if (args.counts == nullptr || threadIdx.x % 32 != 0) return;
  // Listed keys lie after the sink and before the window: none is in a kept block, but where all are kept.
  const int64_t list = int64_t{head} * a.segment_rows + SegmentBaseOf(a, s.index) + i;
  if (!whole) kept += r.by_block(args.lists[list * args.stride] + r.block_size / 2);
  args.counts[row] = kept;
}

} // namespace

cudaError_t LaunchListMask(const ListMaskArgs& args, cudaStream_t stream) {
  const int64_t rows = int64_t{args.mask_heads} * args.shape.rules.tile_rows;
  const int64_t grid = std::max(DivUp<int64_t>(rows, kWarps), DivUp<int64_t>(args.shape.d.p.batch, kThreads));
  if (grid == 0) return cudaSuccess;
  ListMaskKernel<<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

} // namespace flashprefill::cuda
