// What the softmaxes of sampled rows put on each key block, and on each distance in blocks, and which of them are kept.
// First a CTA adds up a panel's rows, then another one the panels of a head. Sums have one order, whatever else runs.
#include "cuda/common/energies/keep.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/sampled/args.h"

namespace flashprefill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = kSampledRows;

struct RowsShared {
  float lse[kRows]; // log2 of a row's denominator; +inf: it has no share in anything
  int seen[kRows];  // parts
  int own[kRows];   // the block that the row stands in; -1: no row
};

__global__ void __launch_bounds__(kThreads) MassesKernel(const __grid_constant__ SampledShape a) {
  __shared__ RowsShared shared;
  const Problem& p = a.d.p;
  const int head = blockIdx.y, panel = a.first_panel + static_cast<int>(blockIdx.x);
  const DeviceSequence s = SequenceAt(a.d, SequenceOfSlot(p.batch, panel, [&](int b) { return PanelBase(a, b); }));
  const int in_sequence = panel - PanelBase(a, s.index);
  const RowSample sample = SampleOf(a, s);
  if (in_sequence < 0 || in_sequence >= PanelsOf(a, sample) || KeepsEverything(p, a.rules, s)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t slot = int64_t{head} * (a.end_panel - a.first_panel) + panel - a.first_panel;
  const float* const energies = a.energies + slot * kRows * a.part_stride;

  // Denominators, a warp for each row.
  for (int j = warp; j < kRows; j += kWarps) {
    const int row = SampledRow(a, sample, in_sequence * kRows + j);
    const int seen = row < 0 ? 0 : (s.prefix + row) / a.part_keys + 1;
    const float* const of_row = energies + j * a.part_stride;
    float largest = -INFINITY, sum = 0;
#pragma unroll 4
    for (int i = lane; i < seen; i += 32) largest = fmaxf(largest, of_row[i]);
    largest = WarpMax(largest);
    const float base = largest == -INFINITY ? 0.f : largest;
#pragma unroll 4
    for (int i = lane; i < seen; i += 32) sum += Exp2(of_row[i] - base);
    sum = WarpSum(sum);
    if (lane == 0) {
      shared.lse[j] = sum > 0 ? base + __log2f(sum) : INFINITY;
      shared.seen[j] = seen;
      shared.own[j] = row < 0 ? -1 : a.rules.by_block(s.prefix + row);
    }
  }
  __syncthreads();

  // Shares, first by key block, then by distance.
  float* const by_block = a.masses + (int64_t{head} * a.panel_room + panel) * 2 * a.block_room;
  const auto share = [&](int j, int block) {
    float sum = 0;
    const int end = min((block + 1) * a.block_parts, shared.seen[j]);
    for (int i = block * a.block_parts; i < end; ++i) sum += Exp2(energies[j * a.part_stride + i] - shared.lse[j]);
    return sum;
  };
  const int blocks = s.Blocks(a.rules);
  for (int b = threadIdx.x; b < blocks; b += kThreads) {
    float by_key = 0, by_distance = 0;
    for (int j = 0; j < kRows; ++j) {
      const int own = shared.own[j];
      if (b > own) continue;
      by_key += share(j, b);
      by_distance += share(j, own - b);
    }
    by_block[b] = by_key;
    by_block[a.block_room + b] = by_distance;
  }
}

__global__ void __launch_bounds__(kThreads) ChoiceKernel(const __grid_constant__ SampledShape a, float coverage,
                                                         const __grid_constant__ VerticalSlashChoice to) {
  extern __shared__ float mass[];
  const Problem& p = a.d.p;
  const int head = static_cast<int>(blockIdx.x) / 2, which = blockIdx.x % 2, lane = threadIdx.x % 32;
  const DeviceSequence s = SequenceAt(a.d, blockIdx.y);
  if (KeepsEverything(p, a.rules, s)) return;
  const int blocks = s.Blocks(a.rules), panels = PanelsOf(a, SampleOf(a, s));
  const float* const from =
      a.masses + ((int64_t{head} * a.panel_room + PanelBase(a, s.index)) * 2 + which) * a.block_room;
  for (int b = threadIdx.x; b < blocks; b += kThreads) {
    float sum = 0;
#pragma unroll 8
    for (int panel = 0; panel < panels; ++panel) sum += from[panel * 2 * a.block_room + b];
    mass[b] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const auto value_of = [&](int b) { return mass[b]; };
  float unused = 0;
  const float largest = LargestEnergy<false>(value_of, blocks, unused);
  Threshold threshold = FindThreshold(value_of, blocks, largest, true, coverage);
  if (!(largest > 0)) threshold = {~0u, ~0u, 0}; // nothing has mass
  const int64_t index = int64_t{blockIdx.y} * p.q_heads + head;
  uint32_t* const bits = which == 0 ? to.verticals + index * 2 * to.words : to.slashes + index * to.slash_words;
  for (int group = 0; 32 * group < blocks; ++group) {
    const int b = 32 * group + lane;
    const uint32_t word = Reaches(threshold, b < blocks, mass[min(b, blocks - 1)]);
    if (lane == 0) bits[group] = word;
  }
}

} // namespace

cudaError_t LaunchSampledMasses(const SampledShape& shape, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(shape.end_panel - shape.first_panel), static_cast<unsigned>(shape.d.p.q_heads));
  MassesKernel<<<grid, kThreads, 0, stream>>>(shape);
  return cudaGetLastError();
}

bool SampledChooses(const Gpu& gpu, int64_t max_blocks) { return max_blocks < gpu.shared_bytes / 4; }

cudaError_t LaunchSampledChoice(const SampledShape& shape, float coverage, const VerticalSlashChoice& choice,
                                cudaStream_t stream) {
  const Problem& p = shape.d.p;
  const int bytes = static_cast<int>(shape.block_room) * 4;
  if (cudaError_t e = AllowShared(ChoiceKernel, bytes)) return e;
  const dim3 grid(static_cast<unsigned>(2 * p.q_heads), static_cast<unsigned>(p.batch));
  ChoiceKernel<<<grid, kThreads, static_cast<size_t>(bytes), stream>>>(shape, coverage, choice);
  return cudaGetLastError();
}

} // namespace flashprefill::cuda
