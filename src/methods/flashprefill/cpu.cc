// FlashPrefill (arXiv 2603.06199) on the CPU: a key block is its mean.
#include "cpu/energies/energies.h"

namespace flashprefill::methods::flashprefill {
namespace {

class Selection : public cpu::EnergySelection {
 public:
  explicit Selection(const cpu::SelectCall& call)
      : Selection(call, reinterpret_cast<const fp_flashprefill&>(call.policy)) {}

 private:
  Selection(const cpu::SelectCall& call, const fp_flashprefill& policy)
      : EnergySelection(call, {.query_pool = policy.query_pool},
                        {.alpha = policy.alpha, .min_blocks = policy.min_blocks}, /*query_metric=*/false) {}
};

} // namespace

extern const cpu::Selector kCpu = cpu::SelectorBy<Selection>();

} // namespace flashprefill::methods::flashprefill
