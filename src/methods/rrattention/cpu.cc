// RRAttention (arXiv 2602.05853) on the CPU: cells are means of keys, and a row is one query of its cell, another one
// in each head.
#include "cpu/strided/strided.h"
#include "cpu/top_p.h"

namespace flashprefill::methods::rrattention {
namespace {

int64_t FillLane(const Problem& p, const Policy& policy, const cpu::StridedKernels& kernels, const Sequence& s,
                 const Tile& tile, int64_t begin, int head, float* row, float* lane) {
  const int stride = reinterpret_cast<const fp_rrattention&>(policy).stride;
  const int64_t i = std::min<int64_t>(begin + stride - 1 - head % stride, tile.end - 1);
  kernels.load_query(p, s, i, head, ExponentScale(p), row);
  for (int64_t d = 0; d < p.head_dim; ++d) lane[d * cpu::kStridedLanes] = row[d];
  return (s.prefix + i) / stride + 1;
}

void Keep(const Policy& policy, const Tile& tile, int head, const float* mass, uint64_t* keys, uint64_t* row) {
  cpu::TopP(mass, tile.visible, reinterpret_cast<const fp_rrattention&>(policy).threshold, keys, row);
}

class Selection : public cpu::StridedSelection {
 public:
  explicit Selection(const cpu::SelectCall& call)
      : StridedSelection(call, {reinterpret_cast<const fp_rrattention&>(call.policy).stride, call.p.head_dim,
                                /*cell_means=*/true, FillLane, Keep}) {}
};

} // namespace

extern const cpu::Selector kCpu = cpu::SelectorBy<Selection>();

} // namespace flashprefill::methods::rrattention
