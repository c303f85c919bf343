// See panels.h.
#include "cpu/energies/panels.h"

namespace flashprefill::cpu {

void KeyPanels::Describe(const SelectFrame& frame, const float* metric) const {
  const auto runs_of = [&](const Sequence& s) { return DivUp(plan.g.Blocks(s), kRunBlocks); };
  // Neighbouring heads together are longer runs of memory, fewer heads are more units: some six for each thread.
  const auto heads_per_unit = [&](const Sequence& s) {
    return static_cast<int>(std::clamp<int64_t>(runs_of(s) * p_.kv_heads / (6 * frame.threads()), 1, p_.kv_heads));
  };
  frame.ForUnits([&](const Sequence& s) { return runs_of(s) * DivUp(p_.kv_heads, heads_per_unit(s)); },
                 [&](const Sequence& s, int64_t unit, Workspace scratch) {
                   const int64_t runs = runs_of(s), block = unit % runs * kRunBlocks;
                   const int heads = heads_per_unit(s), head = static_cast<int>(unit / runs) * heads;
                   const float* own = metric ? metric + int64_t{s.index} * p_.kv_heads * p_.head_dim : nullptr;
                   kernels.describe(p_, plan, s, block, std::min(block + kRunBlocks, plan.g.Blocks(s)), head,
                                    std::min(head + heads, p_.kv_heads), own, Of(frame, s, 0), TakeScratch(scratch));
                 });
}

} // namespace flashprefill::cpu
