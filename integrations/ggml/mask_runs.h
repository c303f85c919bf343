// What ggml's mask says. A micro-batch holds rows of one sequence or of several; the KV cache holds their keys in cells
// that may be shared out in any way; and the mask, one fp16 number for each row and cell, is all that an operator gets
// to know of either. A row of a causal sequence sees what the row before it sees, and its own cell. So rows are cut
// into *runs*: as long as each row adds exactly one cell to those of the row before it, they are one causal sequence,
// whatever the order of its cells, and the query rows are its last ones.
#ifndef FLASHPREFILL_INTEGRATIONS_GGML_MASK_RUNS_H_
#define FLASHPREFILL_INTEGRATIONS_GGML_MASK_RUNS_H_

#include <cstdint>
#include <vector>

namespace flashprefill::ggml {

using Rank = int64_t; // how many keys of its sequence were read before a key
constexpr Rank kNoRank = -1;

// Rows [first, first + rows) of a mask.
struct Run {
  int64_t first = 0, rows = 0;
  // The cells that its last row sees: row first + i sees all but the last rows - 1 - i of them. Those that its first
  // row sees are in the order of their numbers until OrderKeys has seen them (key_order.h). Empty: these rows are no
  // causal sequence, or one that is shorter than was asked for.
  std::vector<int32_t> cells;
  int64_t known = 0;         // so many of the first cells are in the log of ranks,
  Rank last_known = kNoRank; // up to this rank

  bool causal() const { return !cells.empty(); }
  // How many cells its first row sees.
  int64_t seen() const { return static_cast<int64_t>(cells.size()) - (rows - 1); }
  // Whether the cells are neighbours, in order.
  bool contiguous() const;
};

// Reads mask [rows][cells] of fp16, row_stride elements apart, on `threads` threads. Runs of fewer than least_rows are
// joined into runs that are not causal.
std::vector<Run> FindRuns(const uint16_t* mask, int64_t rows, int64_t cells, int64_t row_stride, int64_t least_rows,
                          int threads);

} // namespace flashprefill::ggml

#endif // FLASHPREFILL_INTEGRATIONS_GGML_MASK_RUNS_H_
