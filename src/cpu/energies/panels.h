// Key blocks as panels of terms (see plan.h), for one wave.
#ifndef FLASHPREFILL_CPU_ENERGIES_PANELS_H_
#define FLASHPREFILL_CPU_ENERGIES_PANELS_H_

#include "cpu/energies/kernels.h"
#include "cpu/frame.h"

namespace flashprefill::cpu {

class KeyPanels {
 public:
  KeyPanels(const SelectCall& call, const EnergyTerms& terms)
      : plan(EnergyPlan::Of(call, terms)), kernels(EnergyKernelsFor(call.exec)), p_(call.p) {}

  const EnergyPlan plan;
  const EnergyKernels& kernels;

  void Take(Workspace& memory, int64_t panels) {
    panels_ = memory.Take<float>(panels * p_.kv_heads * plan.panel_floats);
  }
  // The part of a thread's memory that Describe needs: to be taken first.
  float* TakeScratch(Workspace& memory) const { return memory.Take<float>(DescribeScratch(p_, plan)); }

  // Writes the panels of the wave. metric: [batch][kv_heads][head_dim], see EnergyKernels::describe; or null.
  void Describe(const SelectFrame& frame, const float* metric) const;

  // Those of a KV head of a sequence.
  float* Of(const SelectFrame& frame, const Sequence& s, int kv_head) const {
    return panels_ + frame.Panel(s, kv_head, p_.kv_heads) * plan.panel_floats;
  }

 private:
  const Problem& p_;
  float* panels_ = nullptr;
};

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_ENERGIES_PANELS_H_
