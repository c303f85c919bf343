// XAttention (arXiv 2503.16428): cells are the keys themselves, one after the other, and a row is the queries of its
// cell from the last to the first, so that their product is the sum over the anti-diagonal.
#include "cpu/policies.h"
#include "cpu/select_keep.h"
#include "cpu/strided.h"

namespace flashprefill::cpu {
namespace {

int64_t FillLane(const Problem& p, const Policy& policy, const StridedKernels& kernels, const Sequence& s,
                 const Tile& tile, int64_t begin, int head, float* row, float* lane) {
  const auto& x = reinterpret_cast<const fp_xattention&>(policy);
  const float factor = static_cast<float>(p.softmax_scale * 1.4426950408889634 / (double{x.norm} * x.stride));
  const int64_t end = std::min(begin + x.stride, tile.end);
  for (int64_t i = begin; i < end; ++i) {
    kernels.load_query(p, s, i, head, factor, row);
    float* into = lane + (begin + x.stride - 1 - i) * p.head_dim * kStridedLanes;
    for (int64_t d = 0; d < p.head_dim; ++d) into[d * kStridedLanes] = row[d];
  }
  return (s.prefix + end - 1) / x.stride + 1;
}

// The forced blocks count first: they may hold enough.
void Keep(const Policy& policy, const Tile& tile, int head, const float* mass, uint64_t* keys, uint64_t* row) {
  const auto& x = reinterpret_cast<const fp_xattention&>(policy);
  KeepForced(policy, tile, row);
  TopP(mass, tile.visible, x.head_count > 0 ? x.head_thresholds[head] : x.threshold, keys, row);
}

StridedMethod MethodOf(const Problem& p, const Policy& policy) {
  const int stride = reinterpret_cast<const fp_xattention&>(policy).stride;
  return {stride, int64_t{stride} * p.head_dim, false, FillLane, Keep};
}

} // namespace

size_t XAttentionWorkspace(const Problem& p, const Policy& policy, const Exec& exec) {
  return StridedWorkspace(MethodOf(p, policy), p, policy, exec);
}

void SelectXAttention(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace) {
  StridedSelect(MethodOf(p, policy), p, policy, exec, mask, workspace);
}

} // namespace flashprefill::cpu
