// Gather on the CPU: keys are ranked as cpu/key_ranking.h says, and kept without being sorted (cpu/key_threshold.h).
#include "cpu/key_ranking.h"
#include "cpu/key_threshold.h"
#include "methods/gather/segment.h"

namespace flashprefill::methods::gather {
namespace {

class Selection {
 public:
  using Scratch = cpu::KeyRanking::Scratch;

  explicit Selection(const cpu::SelectCall& call)
      : call_(call), policy_(reinterpret_cast<const fp_gather&>(call.policy)), ranking_(call, policy_.segment) {}

  cpu::ItemShape Shape() const { return ranking_.Shape(); }
  void Take(Workspace&, int64_t) {}
  Scratch TakeScratch(Workspace& memory) const { return ranking_.TakeScratch(memory); }
  void Describe(const cpu::SelectFrame&) const {}

  void Choose(const cpu::Item& item, const Scratch& scratch) const {
    ranking_.Choose(item, scratch, [&](const Segment& segment, const float* energies, int32_t* list) {
      const cpu::KeyThreshold threshold =
          cpu::FindKeyThreshold(energies, segment.ranked(), RuleFor(segment), scratch.ranks);
      cpu::TakeKeys(energies, segment.ranked(), threshold, segment.first_key, list + 2);
      list[0] = static_cast<int32_t>(threshold.kept);
      list[1] = static_cast<int32_t>(threshold.wanted);
    });
  }

 private:
  cpu::KeyRule RuleFor(const Segment& segment) const {
    cpu::KeyRule rule;
    rule.room = std::min<int64_t>(policy_.max_keys, call_.p.max_seqlen_k);
    rule.gain = double{policy_.gain} / kGainKeys;
    if (std::isnan(policy_.gain)) rule.count = BudgetKeys(policy_, segment.ranked());
    return rule;
  }

  const cpu::SelectCall& call_;
  const fp_gather& policy_;
  const cpu::KeyRanking ranking_;
};

} // namespace

extern const cpu::Selector kCpu = cpu::SelectorBy<Selection>();

} // namespace flashprefill::methods::gather
