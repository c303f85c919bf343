// From logits of pooled rows to bits, one warp per tile of a head. A row's logits go to shared memory once, there to
// become energies or masses, and threshold.cuh finds the largest ones that reach a target. Where a tile has several
// rows, or a row several bands, the tile keeps what any of them chooses.
#include <cfloat>

#include "cuda/common/energies/keep.cuh"
#include "cuda/common/grid_control.cuh"
#include "cuda/common/heuristics.h"
#include "cuda/common/launch.h"
#include "cuda/common/pooled/args.h"

namespace flashprefill::cuda {
namespace {

constexpr int kMostWarps = 8; // of a CTA

struct KeepPlan {
  int warps;  // tiles of a CTA
  int stride; // floats per tile
};

// The largest energies of a row, chosen by one warp.
struct RowChooser {
  const PooledKeepArgs& args;
  float* values; // in shared memory
  uint32_t* bits;
  int half_words;
  int lane;

  // Makes the logits of `seen` blocks energies, base 2, and returns the largest; `none`: the energy of a block that has
  // a rank but no finite score. Blocks that are not similar in themselves have no rank, which is -inf.
  __device__ float Load(const float* logits, int seen, float factor, float none, const uint8_t* similar) const {
    float largest = -INFINITY;
    __syncwarp(); // the row before this one has been read
    for (int b = lane; b < seen; b += 32) {
      const float z = logits[b] * factor;
      const float energy = similar && !similar[b] ? -INFINITY : IsFinite(z) ? z : none;
      values[b] = energy;
      largest = fmaxf(largest, energy);
    }
    __syncwarp();
    return WarpMax(largest);
  }

  __device__ void MakeMasses(int seen, float largest) const {
    for (int b = lane; b < seen; b += 32) values[b] = Exp2(values[b] - largest);
    __syncwarp();
  }

  // Joins the blocks that a threshold lets pass.
  __device__ void Join(int seen, Threshold threshold) const {
    for (int group = 0; 32 * group < seen; group += 32) {
      uint32_t mine = 0;
      for (int j = 0; j < 32 && 32 * (group + j) < seen; ++j) {
        const int b = 32 * (group + j) + lane;
        const uint32_t chosen = Reaches(threshold, b < seen, values[min(b, seen - 1)]);
        if (j == lane) mine = chosen;
      }
      if (group + lane < half_words) bits[group + lane] |= mine;
    }
  }

  // Of a smallest set that reaches `share` of the masses' sum, the part that does not pass it: at least one.
  __device__ Threshold WithoutPassing(int seen, Threshold threshold, float share) const {
    float above = 0, sum = 0, value = 0;
    int number = 0, equal = 0;
    for (int b = lane; b < seen; b += 32) {
      const float mass = values[b];
      const uint32_t order = OrderOf(mass);
      sum += mass;
      if (order >= threshold.above) {
        above += mass;
        ++number;
      } else if (order >= threshold.from) {
        value = fmaxf(value, mass);
        ++equal;
      }
    }
    above = WarpSum(above);
    sum = WarpSum(sum);
    value = WarpMax(value);
    number = __reduce_add_sync(~0u, number);
    equal = __reduce_add_sync(~0u, equal);
    const float fit = value > 0 ? floorf((share * sum - above) / value) : 0;
    threshold.ties = static_cast<int>(fminf(fmaxf(fit, number == 0 ? 1.f : 0.f), static_cast<float>(equal)));
    return threshold;
  }

  __device__ void ByMass(int seen, float largest, bool may_pass) const {
    const auto value_of = [&](int b) { return values[b]; };
    const float share = static_cast<float>(args.share);
    MakeMasses(seen, largest);
    Threshold threshold = FindThreshold(value_of, seen, 1.f, true, share);
    if (!may_pass) threshold = WithoutPassing(seen, threshold, share);
    Join(seen, threshold);
  }

  __device__ void ByNumber(int seen, float largest, int64_t number) const {
    int ranked = 0;
    for (int b = lane; b < seen; b += 32) ranked += values[b] > -INFINITY;
    ranked = __reduce_add_sync(~0u, ranked);
    const int count = static_cast<int>(min(number, int64_t{ranked}));
    if (count <= 0) return;
    const auto value_of = [&](int b) { return values[b]; };
    Join(seen, FindThreshold(value_of, seen, largest, false, static_cast<float>(count)));
  }
};

// What a row's products with mean keys are multiplied by to become exponents, in a band. Scores are q.k / (sqrt(d_b)
// tau) with tau = sqrt(d_b / d) (r_q,b / r_q) (r_k,b / r_k), where r are root mean squares over the d_b dimensions of
// the band and over all d of them. 0 for a band without dimensions or without energy.
template <typename T>
__device__ float BandFactor(const PooledShape& a, const T* row, const BandSquares& keys, int band) {
  float all = 0, own = 0;
  int dims = 0;
  for (int d = threadIdx.x % 32; d < a.d.p.head_dim; d += 32) {
    const float x = ToFloat(row[d]), square = x * x;
    const bool in = a.bands.dims[band][d / 32] >> (d % 32) & 1;
    all += square;
    own += in ? square : 0.f;
    dims += in;
  }
  const double n = __reduce_add_sync(~0u, dims), d = a.d.p.head_dim;
  const double q_all = WarpSum(all), q_own = WarpSum(own);
  const double tau = sqrt(n / d) * sqrt(q_own / n / (q_all / d)) * sqrt(keys.band[band] / n / (keys.all / d));
  return tau > 0 && tau < INFINITY ? static_cast<float>(sqrt(d / n) / tau) : 0.f;
}

struct KeepTile {
  DeviceSequence sequence;
  DeviceTile tile;
  int head, panel, first_panel; // of the round's, of the sequence
  int m, row;                   // of the sequence, of the mask
};

__device__ bool PlaceTile(const PooledKeepArgs& args, int number, KeepTile& t) {
  const PooledShape& a = args.shape;
  const Problem& p = a.d.p;
  const int pair = a.by_panel_tiles(number), in_panel = number - pair * a.tiles_per_panel;
  const int panel = a.by_heads(pair);
  t.head = pair - panel * p.q_heads;
  t.panel = a.end_panel - 1 - panel; // later tiles see more
  if (t.panel < a.first_panel || IsSkipped(a, t.head)) return false;
  t.sequence = SequenceAt(a.d, SequenceOfSlot(p.batch, t.panel, [&](int b) { return PanelBase(a, b); }));
  t.first_panel = PanelBase(a, t.sequence.index);
  t.m = (t.panel - t.first_panel) * a.tiles_per_panel + in_panel;
  const int tile_row = t.sequence.TileBase(a.rules) + t.m;
  if (t.m < 0 || t.m >= t.sequence.Tiles(a.rules) || tile_row >= a.rules.tile_rows) return false;
  t.tile = TileAt(p, a.rules, t.sequence, t.m);
  t.row = t.head * a.rules.tile_rows + tile_row;
  return true;
}

template <typename T>
__global__ void __launch_bounds__(32 * kMostWarps)
    PooledKeepKernel(const __grid_constant__ PooledKeepArgs args, const __grid_constant__ KeepPlan plan) {
  extern __shared__ float shared[];
  GridRelease(); // attend may take its place as soon as there is room
  const PooledShape& a = args.shape;
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
  KeepTile t;
  if (!PlaceTile(args, blockIdx.x * plan.warps + warp, t)) return;
  const DeviceSequence& s = t.sequence;
  const int visible = t.tile.visible, first_row = a.by_row(t.tile.begin), last_row = a.by_row(t.tile.end - 1);
  const int64_t q_row = int64_t{t.head} * a.row_room + RowBase(a, s.index) + first_row;
  const int64_t k_row = t.head / r.units_per_kv * a.mean_rows + MeanBase(p, s, r.block_size);
  const uint8_t* const similar = args.similar_keys ? args.similar_keys + k_row : nullptr;
  bool all = t.m >= FirstDenseTile(r, s) || KeepsEverything(p, r, s);
  if (!all && args.similar_rows) all = !args.similar_rows[q_row];
  RowChooser chooser{args, shared + warp * plan.stride, reinterpret_cast<uint32_t*>(args.bits + t.row * args.words),
                     static_cast<int>(2 * args.words), lane};

  // Begin with what is kept whatever the scores are.
  const int sink = all ? visible : args.choice_alone ? 0 : r.sink_blocks;
  const int window = args.choice_alone ? visible : WindowBegin(r, t.tile);
  for (int group = 0; group < chooser.half_words; group += 32) {
    uint32_t mine = 0;
    for (int j = 0; similar && !all && j < 32 && 32 * (group + j) < visible; ++j) {
      const int b = 32 * (group + j) + lane;
      const uint32_t unlike = __ballot_sync(~0u, b < visible && !similar[min(b, visible - 1)]);
      if (j == lane) mine = unlike;
    }
    const int first = 32 * (group + lane);
    mine |= RangeBits(0, sink, first) | RangeBits(window, visible, first);
    if (group + lane < chooser.half_words) chooser.bits[group + lane] = mine & RangeBits(0, visible, first);
  }
  // Join what the rows choose.
  const bool by_mass = args.rule == PooledRule::kLeastMass || args.rule == PooledRule::kMostMass;
  const float none = args.rule == PooledRule::kNumber ? -INFINITY : -FLT_MAX;
  for (int row = first_row; row <= last_row && !all; ++row) {
    const int seen = SeenByRow(a, s, row); // a row of several tiles ranks what its last one sees
    for (int band = 0; band < a.bands.count; ++band) {
      float factor = a.exponent_scale;
      if (args.squares) {
        const T* const mean = static_cast<const T*>(a.q_rows) + (q_row + row - first_row) * a.pitch;
        factor *= BandFactor(a, mean, args.squares[k_row + seen - 1], band);
        if (factor == 0) continue;
      }
      const float* const logits = LogitsOf(a, t.head, t.panel, band, row - (t.panel - t.first_panel) * kPanelRows);
      const float largest = chooser.Load(logits, seen, factor, none, similar);
      if (args.rule == PooledRule::kShare) {
        chooser.ByNumber(seen, largest, static_cast<int64_t>(args.share * s.Blocks(r) * (1 + 1e-6)));
      } else if (!by_mass) {
        chooser.ByNumber(seen, largest, args.numbers[min(t.head, kMaxPooledHeads - 1)]);
      } else if (largest > -FLT_MAX) {
        chooser.ByMass(seen, largest, args.rule == PooledRule::kLeastMass);
      } else if (args.rule == PooledRule::kMostMass) { // nothing has mass: all of it together passes no share
        chooser.Join(seen, {0, 0, 0});
      }
    }
  }
  // Count.
  if (!args.counts || args.choice_alone) return;
  int kept = 0;
  for (int word = lane; word < chooser.half_words; word += 32) kept += __popc(chooser.bits[word]);
  kept = __reduce_add_sync(~0u, kept);
  if (lane == 0) args.counts[t.row] = kept;
}

int FloatsOfTile(int64_t max_blocks) {
  return static_cast<int>(DivUp<int64_t>(std::max<int64_t>(max_blocks, 1), 32) * 32);
}

} // namespace

bool PooledKeeps(const Gpu& gpu, int64_t max_blocks) { return max_blocks < gpu.shared_bytes / 4 - 32; }

cudaError_t LaunchPooledKeep(const PooledKeepArgs& args, const Gpu& gpu, cudaStream_t stream) {
  const PooledShape& a = args.shape;
  KeepPlan plan{};
  plan.stride = FloatsOfTile(DivUp<int64_t>(a.d.p.max_seqlen_k, a.rules.block_size));
  plan.warps = KeepWarps(gpu, plan.stride, kMostWarps);
  const int bytes = plan.warps * plan.stride * 4;
  const auto kernel = a.d.p.q.dtype == FP_BF16 ? PooledKeepKernel<__nv_bfloat16> : PooledKeepKernel<__half>;
  if (cudaError_t e = AllowShared(kernel, bytes)) return e;
  const int64_t tiles = int64_t{a.end_panel - a.first_panel} * a.d.p.q_heads * a.tiles_per_panel;
  kernel<<<static_cast<unsigned>(DivUp<int64_t>(tiles, plan.warps)), 32 * plan.warps, static_cast<size_t>(bytes),
           stream>>>(args, plan);
  return cudaGetLastError();
}

} // namespace flashprefill::cuda
