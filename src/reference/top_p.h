// Top-p and top-k over masses of items (key blocks, block distances), as each method's paper defines them. Each answer
// also says which items are near a tie: they could change if masses were known only to within a tolerance.
#ifndef FLASHPREFILL_REFERENCE_TOP_P_H_
#define FLASHPREFILL_REFERENCE_TOP_P_H_

#include <vector>

#include "reference/reference.h"

namespace flashprefill::reference {

// The answer, per item.
struct Verdict {
  std::vector<uint8_t> kept, near_tie;
};

// The smallest set that holds `share` of all mass: items by descending mass, equal ones by index, the item that crosses
// the share included. The items of `first` (empty: none) are kept and counted before the others.
Verdict TopP(const std::vector<double>& mass, double share, const std::vector<uint8_t>& first, double tolerance);

// The same without the item that crosses: the cumulative mass stays at or below `share`. The top item is always kept.
Verdict TopPExclusive(const std::vector<double>& mass, double share, double tolerance);

// The `count` items with the largest mass.
Verdict TopK(const std::vector<double>& mass, int64_t count, double tolerance);

// The items that either keeps.
Verdict Union(const Verdict& a, const Verdict& b);

} // namespace flashprefill::reference

#endif // FLASHPREFILL_REFERENCE_TOP_P_H_
