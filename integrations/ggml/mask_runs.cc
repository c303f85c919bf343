// A mask is as large as the scores of one head: 8 MB for 512 rows of 8K keys. Neighbouring
// rows are equal but for one cell, so runs of 64 cells are compared as bits, and only those that differ are looked at.
#include "mask_runs.h"

#include <algorithm>
#include <cstring>

namespace flashprefill::ggml {
namespace {

constexpr uint16_t kSeen = 0;        // +0.0
constexpr uint16_t kHidden = 0xfc00; // -inf
constexpr int64_t kNone = -1;
constexpr int64_t kStep = 64;

// The one cell that `row` sees and `before` does not, if that is all the difference between them; else kNone.
int64_t CellAdded(const uint16_t* before, const uint16_t* row, int64_t cells) {
  int64_t added = kNone;
  for (int64_t begin = 0; begin < cells; begin += kStep) {
    const int64_t count = std::min(kStep, cells - begin);
    if (std::memcmp(before + begin, row + begin, count * sizeof(uint16_t)) == 0) continue;
    for (int64_t i = begin; i < begin + count; ++i) {
      if (before[i] == row[i]) continue;
      if (added != kNone || before[i] != kHidden || row[i] != kSeen) return kNone;
      added = i;
    }
  }
  return added;
}

// Whether a row does nothing but show and hide.
bool IsBinary(const uint16_t* row, int64_t cells) {
  return std::all_of(row, row + cells, [](uint16_t x) { return x == kSeen || x == kHidden; });
}

// The cells of a run whose first row is `row` and whose later rows add `added`.
std::vector<int32_t> CellsOf(const uint16_t* row, int64_t cells, const int64_t* added, int64_t count) {
  std::vector<int32_t> all;
  all.reserve(cells);
  for (int64_t i = 0; i < cells; ++i) {
    if (row[i] == kSeen) all.push_back(static_cast<int32_t>(i));
  }
  all.insert(all.end(), added, added + count);
  return all;
}

} // namespace

bool Run::contiguous() const {
  for (size_t i = 1; i < cells.size(); ++i) {
    if (cells[i] != cells[0] + static_cast<int32_t>(i)) return false;
  }
  return true;
}

std::vector<Run> FindRuns(const uint16_t* mask, int64_t rows, int64_t cells, int64_t row_stride, int64_t least_rows,
                          int threads) {
  std::vector<int64_t> added(rows, kNone); // by each row to the one before it
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 1; r < rows; ++r) {
    added[r] = CellAdded(mask + (r - 1) * row_stride, mask + r * row_stride, cells);
  }

  std::vector<Run> runs;
  for (int64_t first = 0, end; first < rows; first = end) {
    for (end = first + 1; end < rows && added[end] != kNone;) ++end;
    const uint16_t* row = mask + first * row_stride;
    Run run;
    run.first = first;
    run.rows = end - first;
    if (run.rows >= least_rows && IsBinary(row, cells)) {
      run.cells = CellsOf(row, cells, added.data() + first + 1, run.rows - 1);
      if (static_cast<int64_t>(run.cells.size()) < run.rows) run.cells.clear(); // its first row sees nothing
    }
    if (!run.causal() && !runs.empty() && !runs.back().causal()) {
      runs.back().rows += run.rows;
    } else {
      runs.push_back(std::move(run));
    }
  }
  return runs;
}

} // namespace flashprefill::ggml
