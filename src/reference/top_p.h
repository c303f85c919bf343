// The rules that take items (key blocks, block distances) by descending mass, as each method's paper has them, and
// which of their answers would change if masses were known only to within a tolerance.
#ifndef FLASHPREFILL_REFERENCE_TOP_P_H_
#define FLASHPREFILL_REFERENCE_TOP_P_H_

#include <vector>

#include "reference/reference.h"

namespace flashprefill::reference {

// By item.
struct Verdict {
  std::vector<uint8_t> kept, near_tie;
};

// The items of `first` (empty: none) are kept and counted first, then the others by descending mass, equal ones by
// index, until what is kept holds `share` of all mass: the item that crosses it is kept too.
Verdict TopP(const std::vector<double>& mass, double share, const std::vector<uint8_t>& first, double tolerance);

// Items whose mass, added to that of those before them, is at most `share` of all: the crossing one is left out. The
// top item is kept anyway.
Verdict TopPExclusive(const std::vector<double>& mass, double share, double tolerance);

// The top `count` items.
Verdict TopK(const std::vector<double>& mass, int64_t count, double tolerance);

// Keeps what either keeps.
Verdict Union(const Verdict& a, const Verdict& b);

} // namespace flashprefill::reference

#endif // FLASHPREFILL_REFERENCE_TOP_P_H_
