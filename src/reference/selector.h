// What a method's reference.cc defines: how its selector for one head is made.
#ifndef FLASHPREFILL_REFERENCE_SELECTOR_H_
#define FLASHPREFILL_REFERENCE_SELECTOR_H_

#include "reference/reference.h"

namespace flashprefill::reference {

struct Selector {
  std::unique_ptr<HeadSelector> (*make)(const HeadView& head);
};

// Null for a method that keeps the forced blocks and nothing else.
const Selector* SelectorOf(const Policy& policy);

// A `make` for selectors that are built from the head alone.
template <typename T>
std::unique_ptr<HeadSelector> Make(const HeadView& head) {
  return std::make_unique<T>(head);
}

} // namespace flashprefill::reference

#endif // FLASHPREFILL_REFERENCE_SELECTOR_H_
