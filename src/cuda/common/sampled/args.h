// What the launches of the sampled family (SampleAttention) read and write. Plain C++.
//
// The sampled rows of a sequence (core/row_sample.h) are numbered segment by segment, `tail` to a segment; 64 numbers
// are a *panel*. A segment of fewer rows leaves numbers without a row. Panels begin at
// floor(rows before the sequence * ratio / 64) + b * spare_panels, which leaves room for all of them without prefix
// sums. Energies are sums over *parts* of keys, which are key blocks, or 16 keys where blocks are no multiples of 64.
// They are made and added up in rounds of some panels of all heads, so that their array stays small:
//   energies  [q_heads, panels of the round, 64, part_stride]: log2 of a row's sum of exponentials over a part
//   masses    [q_heads, panel_room, 2, block_room]: shares of the rows' softmaxes by key block and by distance in
//   blocks
#ifndef FLASHPREFILL_CUDA_COMMON_SAMPLED_ARGS_H_
#define FLASHPREFILL_CUDA_COMMON_SAMPLED_ARGS_H_

#include <cuda_runtime_api.h>

#include "core/row_sample.h"
#include "cuda/common/sequence.cuh"
#include "cuda/common/vertical_slash/args.h"
#include "cuda/devices.h"

namespace flashprefill::cuda {

constexpr int kSampledRows = 64;    // of a panel
constexpr int kMostChunkParts = 32; // of the keys of a CTA

struct SampledShape {
  DeviceProblem d;
  TileRules rules;
  double ratio; // of rows
  int tail, spare_panels;
  int panel_room;
  int part_keys, block_parts; // keys of a part; parts of a block
  int chunk_parts, chunks;    // parts of a CTA's keys; CTAs of the longest sequence
  int64_t part_stride, block_room;
  float exponent_scale;       // softmax_scale * log2(e)
  int first_panel, end_panel; // of the round
  float *energies, *masses;
  Divider by_tail, by_group, by_round, by_chunks, by_page; // query heads per KV head, panels of a round, chunks
};

cudaError_t LaunchSampledScoreSm90(const SampledShape& shape, cudaStream_t stream);
cudaError_t LaunchSampledScorePortable(const SampledShape& shape, cudaStream_t stream);

// From energies to masses.
cudaError_t LaunchSampledMasses(const SampledShape& shape, cudaStream_t stream);

// The smallest sets of key blocks and of distances with the share `coverage` of the masses of all panels.
bool SampledChooses(const Gpu& gpu, int64_t max_blocks); // whether the masses of a head fit in shared memory
cudaError_t LaunchSampledChoice(const SampledShape& shape, float coverage, const VerticalSlashChoice& choice,
                                cudaStream_t stream);

#ifdef __CUDACC__

__device__ inline RowSample SampleOf(const SampledShape& a, const DeviceSequence& s) {
  return RowSample::Of(s.q_len, a.ratio, a.tail);
}

__device__ inline int PanelBase(const SampledShape& a, int b) {
  return static_cast<int>(QueryBegin(a.d.p, b) * a.ratio / kSampledRows) + b * a.spare_panels;
}

__device__ inline int PanelsOf(const SampledShape& a, const RowSample& sample) {
  return static_cast<int>((sample.segments * a.tail + kSampledRows - 1) / kSampledRows);
}

// The query row of a number, or -1.
__device__ inline int SampledRow(const SampledShape& a, const RowSample& sample, int number) {
  const int segment = a.by_tail(number), in_segment = number - segment * a.tail;
  if (segment >= sample.segments) return -1;
  const int64_t row = sample.Begin(segment) + in_segment;
  return row < sample.End(segment) ? static_cast<int>(row) : -1;
}

#endif // __CUDACC__

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_SAMPLED_ARGS_H_
