// See strided.h.
#include "reference/strided.h"

#include <algorithm>
#include <cmath>

namespace flashprefill::reference {

std::vector<double> StridedMass(const Matrix& cells, const std::vector<StridedRow>& rows, double factor,
                                int64_t cells_per_block, int64_t visible_blocks) {
  std::vector<double> mass(static_cast<size_t>(visible_blocks));
  const int64_t all = std::min(cells.rows, visible_blocks * cells_per_block);
  std::vector<double> z(static_cast<size_t>(all));
  for (const StridedRow& row : rows) {
    const int64_t seen = std::min(all, row.position + 1);
    double largest = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t j = 0; j < seen; ++j) {
      z[j] = factor * Dot(row.q.data(), cells[j], cells.columns);
      if (std::isfinite(z[j])) largest = std::max(largest, z[j]);
    }
    for (int64_t j = 0; j < seen; ++j) {
      z[j] = std::isfinite(z[j]) ? std::exp(z[j] - largest) : 0;
      sum += z[j];
    }
    for (int64_t j = 0; j < seen && sum > 0; ++j) mass[j / cells_per_block] += z[j] / sum;
  }
  return mass;
}

} // namespace flashprefill::reference
