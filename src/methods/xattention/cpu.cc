// XAttention (arXiv 2503.16428) on the CPU: cells are the keys themselves, one after the other, and a row is the
// queries of its cell from the last to the first, so that their product is the sum over the antidiagonal.
#include "cpu/strided/strided.h"
#include "cpu/top_p.h"

namespace flashprefill::methods::xattention {
namespace {

int64_t FillLane(const Problem& p, const Policy& policy, const cpu::StridedKernels& kernels, const Sequence& s,
                 const Tile& tile, int64_t begin, int head, float* row, float* lane) {
  const auto& x = reinterpret_cast<const fp_xattention&>(policy);
  const float factor = static_cast<float>(p.softmax_scale * kLog2E / (double{x.norm} * x.stride));
  const int64_t end = std::min(begin + x.stride, tile.end);
  for (int64_t i = begin; i < end; ++i) {
    kernels.load_query(p, s, i, head, factor, row);
    float* into = lane + (begin + x.stride - 1 - i) * p.head_dim * cpu::kStridedLanes;
    for (int64_t d = 0; d < p.head_dim; ++d) into[d * cpu::kStridedLanes] = row[d];
  }
  return p.causal ? (s.prefix + end - 1) / x.stride + 1 : DivUp<int64_t>(s.k_len, x.stride);
}

// The forced blocks count first: they may hold enough.
void Keep(const Policy& policy, const Tile& tile, int head, const float* mass, uint64_t* keys, uint64_t* row) {
  const auto& x = reinterpret_cast<const fp_xattention&>(policy);
  cpu::KeepForced(policy, tile, row);
  cpu::TopP(mass, tile.visible, x.head_count > 0 ? x.head_thresholds[head] : x.threshold, keys, row);
}

class Selection : public cpu::StridedSelection {
 public:
  explicit Selection(const cpu::SelectCall& call)
      : Selection(call, reinterpret_cast<const fp_xattention&>(call.policy).stride) {}

 private:
  Selection(const cpu::SelectCall& call, int stride)
      : StridedSelection(call, {stride, int64_t{stride} * call.p.head_dim, /*cell_means=*/false, FillLane, Keep}) {}
};

} // namespace

extern const cpu::Selector kCpu = cpu::SelectorBy<Selection>();

} // namespace flashprefill::methods::xattention
