// Policies that score cells of keys in place of keys: XAttention and RRAttention. Each says what the rows of its grid
// are; the softmax over a row, and the sums by block, are the same for both and live in strided.cc.
#ifndef FLASHPREFILL_REFERENCE_STRIDED_H_
#define FLASHPREFILL_REFERENCE_STRIDED_H_

#include <vector>

#include "reference/reference.h"

namespace flashprefill::reference {

// A row of the grid. It sees the key cells [0, position]: those whose first key it may attend to.
struct StridedRow {
  int64_t position; // in cells
  std::vector<double> q;
};

// The mass of each visible block of a tile: for each row the softmax of factor * q . cell over the cells that it sees,
// summed by block and over rows. A score that is not finite counts as nothing; so does a row without others.
std::vector<double> StridedMass(const Matrix& cells, const std::vector<StridedRow>& rows, double factor,
                                int64_t cells_per_block, int64_t visible_blocks);

} // namespace flashprefill::reference

#endif // FLASHPREFILL_REFERENCE_STRIDED_H_
