// From the sums of rows to bits, one warp per tile of a head. A first pass over a row's key tiles gives its
// softmax's reference and sum; a second one adds up the shares of all rows by block, 256 blocks at a time, 16 bytes a
// lane and row. These masses lie in shared memory, where keep.cuh finds the smallest set of the wanted share.
// Where the forced blocks count first their mass is taken off both sides, and they compete no more.
#include "cuda/common/energies/keep.cuh"
#include "cuda/common/grid_control.cuh"
#include "cuda/common/heuristics.h"
#include "cuda/common/launch.h"
#include "cuda/common/strided/cells.cuh"

namespace flashprefill::cuda {
namespace {

constexpr int kMostWarps = 8; // of a CTA
constexpr int kSumsPerLoad = 8;

struct KeepPlan {
  int warps;       // units of a CTA
  int mass_stride; // floats per unit
  Divider by_heads;
};

int MassStride(int64_t max_blocks) {
  return static_cast<int>(DivUp<int64_t>(std::max<int64_t>(max_blocks, 1), 32) * 32);
}

// log2 of the softmax's denominator of row `lane / lanes`, by the `lanes` lanes that have it; -inf if it sees nothing.
__device__ float LogOfRow(const float2* stats, int key_tiles, int lanes) {
  const int first = threadIdx.x & (lanes - 1);
  float largest = -INFINITY;
  for (int k = first; k < key_tiles; k += lanes) largest = fmaxf(largest, stats[k].x);
  for (int offset = lanes / 2; offset; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
  const float base = largest == -INFINITY ? 0.f : largest;
  float sum = 0;
  for (int k = first; k < key_tiles; k += lanes) sum += stats[k].y * Exp2(stats[k].x - base);
  for (int offset = lanes / 2; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum > 0 ? base + __log2f(sum) : -INFINITY;
}

// masses[b] = the shares of all rows in block b, for blocks [0, blocks).
__device__ void AddUpMasses(const StridedArgs& a, int64_t first_row, int key_tiles, int blocks, float* masses) {
  const StridedShape& g = a.shape;
  const int lane = threadIdx.x % 32;
  const int lanes_per_row = 32 >> g.log2_rows;
  const float log_sum = LogOfRow(a.stats + (first_row + lane / lanes_per_row) * g.key_tiles, key_tiles, lanes_per_row);
  const int places = key_tiles * g.block_pitch;
  for (int first = 0; first < places; first += 32 * kSumsPerLoad) {
    const int place = first + lane * kSumsPerLoad;
    const int key_tile = min(place / g.block_pitch, key_tiles - 1), in_tile = place - key_tile * g.block_pitch;
    float mass[kSumsPerLoad] = {};
#pragma unroll 8
    for (int r = 0; r < g.rows_per_unit; ++r) {
      const int64_t at = (first_row + r) * g.key_tiles + key_tile;
      const float log_of_row = __shfl_sync(~0u, log_sum, r * lanes_per_row);
      uint4 raw{};
      float exponent = -INFINITY;
      if (place < places) {
        raw = *reinterpret_cast<const uint4*>(a.sums + at * g.block_pitch + in_tile);
        exponent = a.stats[at].x;
      }
      const float share = log_of_row == -INFINITY ? 0.f : Exp2(exponent - log_of_row);
      const __half2* const sums = reinterpret_cast<const __half2*>(&raw);
#pragma unroll
      for (int i = 0; i < kSumsPerLoad / 2; ++i) {
        const float2 two = __half22float2(sums[i]);
        mass[2 * i] = fmaf(two.x, share, mass[2 * i]);
        mass[2 * i + 1] = fmaf(two.y, share, mass[2 * i + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < kSumsPerLoad; ++i) {
      const int block = key_tile * g.key_tile_blocks + in_tile + i;
      if (place < places && in_tile + i < g.key_tile_blocks && block < blocks) masses[block] = mass[i];
    }
  }
  __syncwarp();
}

__global__ void __launch_bounds__(32 * kMostWarps)
    KeepKernel(const __grid_constant__ StridedKeepArgs args, const __grid_constant__ KeepPlan plan) {
  extern __shared__ float shared[];
  GridRelease(); // attend may take its place as soon as there is room
  GridWait();
  const StridedArgs& a = args.common;
  const StridedShape& g = a.shape;
  const TileRules& r = a.rules;
  const Problem& p = a.d.p;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Report reasons.
  if (blockIdx.x == 0) {
    if (args.attend_counter && threadIdx.x == 0) *args.attend_counter = 0;
    for (int b = threadIdx.x; args.fallback && b < p.batch; b += blockDim.x) {
      args.fallback[b] = FallbackOf(a.d, r, SequenceAt(a.d, b));
    }
  }

  // Find the tile. Later tiles have more to add up, so they come first.
  const int number = blockIdx.x * plan.warps + warp;
  const int turn = plan.by_heads(number), head = number - turn * p.q_heads;
  const int tile_row = a.first_tile + a.tiles - 1 - turn;
  if (turn >= a.tiles) return;
  const DeviceSequence s =
      SequenceAt(a.d, SequenceOfSlot(p.batch, tile_row, [&](int b) { return TileBaseOf(a.d, r, b); }));
  const int m = tile_row - s.TileBase(r);
  if (m < 0 || m >= s.Tiles(r)) return;
  const DeviceTile tile = TileAt(p, r, s, m);
  MaskRow what{0, tile.visible, r.sink_blocks, WindowBegin(r, tile)};
  KeepRule rule{-INFINITY, 0, true, 0};
  float* const masses = shared + warp * plan.mass_stride;
  if (m >= FirstDenseTile(r, s) || KeepsEverything(p, r, s)) {
    what.sink = tile.visible;
  } else {
    const int kv = head / r.units_per_kv;
    const int64_t unit =
        (int64_t{kv} * a.tiles + tile_row - a.first_tile) * r.units_per_kv + head - kv * r.units_per_kv;
    AddUpMasses(a, unit * g.rows_per_unit, KeyTilesSeen(a, s, tile), tile.visible, masses);
    // Take the forced blocks' mass off both sides.
    float forced = 0, rest = 0;
    for (int b = lane; b < tile.visible; b += 32) {
      const float mass = masses[b];
      const bool first = args.forced_first && (b < what.sink || b >= what.window_begin);
      forced += first ? mass : 0.f;
      rest += first ? 0.f : mass;
      masses[b] = first ? -INFINITY : __log2f(mass);
    }
    __syncwarp();
    forced = WarpSum(forced);
    rest = WarpSum(rest);
    const float threshold = args.by_head ? args.head_threshold[head] : args.threshold;
    const float wanted = threshold * (forced + rest) - forced;
    if (threshold >= 1) {
      what.sink = tile.visible; // everything, also blocks whose mass is 0
    } else if (wanted > 0 && rest > 0) {
      what.scored = tile.visible;
      rule.mass = fminf(wanted / rest, 1.f - 0x1p-24f); // 1 would mean blocks without mass too
    }
  }
  // Write the bits.
  const int64_t row = int64_t{head} * r.tile_rows + tile_row;
  const int kept = WriteMaskRow<true>(rule, what, masses, reinterpret_cast<uint32_t*>(args.bits + row * args.words),
                                      static_cast<int>(2 * args.words), 0, 0);
  if (args.counts && lane == 0) args.counts[row] = kept;
}

} // namespace

bool StridedKeeps(const Gpu& gpu, int64_t max_blocks) { return max_blocks < gpu.shared_bytes / 4 - 32; }

cudaError_t LaunchStridedKeep(const StridedKeepArgs& args, const Gpu& gpu, cudaStream_t stream) {
  const StridedArgs& a = args.common;
  KeepPlan plan{};
  plan.mass_stride = MassStride(DivUp<int64_t>(a.d.p.max_seqlen_k, a.rules.block_size));
  plan.warps = KeepWarps(gpu, plan.mass_stride, kMostWarps);
  plan.by_heads = Divider::Of(a.d.p.q_heads);
  const int bytes = plan.warps * plan.mass_stride * 4;
  if (cudaError_t e = AllowShared(KeepKernel, bytes)) return e;
  const int64_t units = int64_t{a.tiles} * a.d.p.q_heads;
  return LaunchOverlapped(KeepKernel, true, DivUp<int64_t>(units, plan.warps), 32 * plan.warps, bytes, stream, args,
                          plan);
}

} // namespace flashprefill::cuda
