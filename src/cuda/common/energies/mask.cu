// Forced blocks as bits, a warp for each row of the mask, and the reason of each sequence by the first warps.
#include "cuda/common/energies/keep.cuh"
#include "cuda/common/energies/mask.h"
#include "cuda/common/grid_control.cuh"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__global__ void __launch_bounds__(kThreads) MaskKernel(const __grid_constant__ MaskArgs a) {
  GridRelease(); // attend may take its place as soon as there is room
  const Problem& p = a.d.p;
  const TileRules& r = a.rules;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (a.fallback && thread < p.batch) {
    a.fallback[thread] = FallbackOf(a.d, r, SequenceAt(a.d, static_cast<int>(thread)));
  }
  if (a.attend_counter && thread == 0) *a.attend_counter = 0;
  const int64_t row = thread / 32;
  if (row >= int64_t{a.mask_heads} * r.tile_rows) return;
  const int tile_row = static_cast<int>(row % r.tile_rows);
  const DeviceSequence s =
      SequenceAt(a.d, SequenceOfSlot(p.batch, tile_row, [&](int b) { return TileBaseOf(a.d, r, b); }));
  const int m = tile_row - s.TileBase(r);
  if (m < 0 || m >= s.Tiles(r)) return;
  const DeviceTile tile = TileAt(p, r, s, m);
  MaskRow what{0, tile.visible, r.sink_blocks, WindowBegin(r, tile)};
  if (r.keeps_everything || s.k_len <= r.dense_up_to_keys || m >= FirstDenseTile(r, s)) what.sink = tile.visible;
  const int kept =
      WriteMaskRow<false, float>(KeepRule{}, what, nullptr, reinterpret_cast<uint32_t*>(a.bits + row * a.words),
                                 static_cast<int>(2 * a.words), 0, 0);
  if (a.counts && threadIdx.x % 32 == 0) a.counts[row] = kept;
}

} // namespace

cudaError_t LaunchMask(const MaskArgs& args, cudaStream_t stream) {
  const int64_t rows = int64_t{args.mask_heads} * args.rules.tile_rows;
  const int64_t grid = std::max(DivUp<int64_t>(rows, kWarps), DivUp<int64_t>(args.d.p.batch, kThreads));
  if (grid == 0) return cudaSuccess;
  MaskKernel<<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

} // namespace flashprefill::cuda
