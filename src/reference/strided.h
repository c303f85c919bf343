// The strided family: methods that score cells of `stride` keys (XAttention and RRAttention). A method says what its
// rows are. The softmax over a row and the sums per block are shared and live in strided.cc.
#ifndef FLASHPREFILL_REFERENCE_STRIDED_H_
#define FLASHPREFILL_REFERENCE_STRIDED_H_

#include <vector>

#include "reference/reference.h"

namespace flashprefill::reference {

// A row that is scored. It sees the key cells [0, position]: those whose first key it may attend to.
struct StridedRow {
  int64_t position; // in cells
  std::vector<double> q;
};

// The mass of each visible block of a tile: for each row the softmax of factor * q . cell over the cells that it sees,
// summed by block and over rows. Non-finite scores are ignored; a row that has no other counts as
// nothing.
std::vector<double> StridedMass(const Matrix& cells, const std::vector<StridedRow>& rows, double factor,
                                int64_t cells_per_block, int64_t visible_blocks);

} // namespace flashprefill::reference

#endif // FLASHPREFILL_REFERENCE_STRIDED_H_
