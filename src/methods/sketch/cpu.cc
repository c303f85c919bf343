// Sketch on the CPU: a key block is its outliers, and the mean and variance of its other keys.
#include "cpu/energies/energies.h"

namespace flashprefill::methods::sketch {
namespace {

class Selection : public cpu::EnergySelection {
 public:
  explicit Selection(const cpu::SelectCall& call) : Selection(call, reinterpret_cast<const fp_sketch&>(call.policy)) {}

 private:
  Selection(const cpu::SelectCall& call, const fp_sketch& policy)
      : EnergySelection(
            call, {.query_pool = policy.query_pool, .variance = true, .outliers = policy.outliers},
            {.alpha = policy.alpha, .mass = policy.mass, .gain = policy.gain, .min_blocks = policy.min_blocks},
            policy.query_metric != 0) {}
};

} // namespace

extern const cpu::Selector kCpu = cpu::SelectorBy<Selection>();

} // namespace flashprefill::methods::sketch
