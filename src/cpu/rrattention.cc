// RRAttention (arXiv 2602.05853): cells are means of keys, and a row is one query of its cell, another one in each
// head.
#include "cpu/policies.h"
#include "cpu/select_keep.h"
#include "cpu/strided.h"

namespace flashprefill::cpu {
namespace {

int64_t FillLane(const Problem& p, const Policy& policy, const StridedKernels& kernels, const Sequence& s,
                 const Tile& tile, int64_t begin, int head, float* row, float* lane) {
  const int stride = reinterpret_cast<const fp_rrattention&>(policy).stride;
  const int64_t i = std::min<int64_t>(begin + stride - 1 - head % stride, tile.end - 1);
  kernels.load_query(p, s, i, head, static_cast<float>(p.softmax_scale * 1.4426950408889634), row);
  for (int64_t d = 0; d < p.head_dim; ++d) lane[d * kStridedLanes] = row[d];
  return (s.prefix + i) / stride + 1;
}

void Keep(const Policy& policy, const Tile& tile, int head, const float* mass, uint64_t* keys, uint64_t* row) {
  TopP(mass, tile.visible, reinterpret_cast<const fp_rrattention&>(policy).threshold, keys, row);
}

StridedMethod MethodOf(const Problem& p, const Policy& policy) {
  return {reinterpret_cast<const fp_rrattention&>(policy).stride, p.head_dim, true, FillLane, Keep};
}

} // namespace

size_t RRAttentionWorkspace(const Problem& p, const Policy& policy, const Exec& exec) {
  return StridedWorkspace(MethodOf(p, policy), p, policy, exec);
}

void SelectRRAttention(const Problem& p, const Policy& policy, const Exec& exec, BlockMask& mask, void* workspace) {
  StridedSelect(MethodOf(p, policy), p, policy, exec, mask, workspace);
}

} // namespace flashprefill::cpu
