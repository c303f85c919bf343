// The reference: what every other backend is compared with. It is written to be read against the definitions, not to be
// fast: scalar loops over double copies of the inputs, two-pass softmax, one function for each rule. It is also the one
// backend that allocates inside a call, because scratch memory from the caller would only hide the mathematics.
//
// A method is a HeadSelector: see selector.h.
#ifndef FLASHPREFILL_REFERENCE_REFERENCE_H_
#define FLASHPREFILL_REFERENCE_REFERENCE_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "core/backend.h"
#include "core/half.h"
#include "core/key_list.h"
#include "core/types.h"
#include "core/vertical_slash.h"

namespace flashprefill::reference {

// Rows of doubles: the keys, values or queries of one head of one sequence.
struct Matrix {
  int64_t rows = 0, columns = 0;
  std::vector<double> data;

  Matrix() = default;
  Matrix(int64_t r, int64_t c) : rows(r), columns(c), data(static_cast<size_t>(r * c)) {}
  double* operator[](int64_t r) { return data.data() + r * columns; }
  const double* operator[](int64_t r) const { return data.data() + r * columns; }
};

Matrix LoadQueries(const Problem& p, const Sequence& s, int64_t head);
Matrix LoadKeys(const Problem& p, const Sequence& s, int64_t kv_head);
Matrix LoadValues(const Problem& p, const Sequence& s, int64_t kv_head);

double Dot(const double* a, const double* b, int64_t n);

// Rule 4: a mean is rounded once, to the dtype of what it is a mean of; to bf16 if that is FP8.
inline double Rounded(int32_t dtype, double x) { return RoundTo(dtype, static_cast<float>(x)); }

// Mean of rows [begin, end) of m, rounded to dtype, written to mean[columns].
void MeanOfRows(const Matrix& m, int64_t begin, int64_t end, int32_t dtype, double* mean);

// One row per key block: the rounded means of the sequence's keys (or values).
Matrix BlockMeans(const Geometry& g, const Sequence& s, const Matrix& keys, int32_t dtype);

// Rule 4: masks agree but for scores that are within this relative error of their threshold.
inline double ScoreTolerance(const Problem& p) { return p.q.dtype == FP_F32 && p.k.dtype == FP_F32 ? 1e-3 : 1e-2; }

// How energies decide. NaN: this rule is not in use.
struct KeepRule {
  double alpha = std::numeric_limits<double>::quiet_NaN();
  double mass = std::numeric_limits<double>::quiet_NaN();
  double gain = std::numeric_limits<double>::quiet_NaN();
  int64_t min_blocks = 0;
};

// What a policy selects for one tile, before forced blocks are joined. One entry per visible block.
struct TileChoice {
  std::vector<double> energy;  // up to a factor common to the tile
  std::vector<uint8_t> scored; // some row of the tile sees the block, as far as scoring goes
  std::vector<uint8_t> kept;
  KeepRule rule;
  std::vector<uint8_t> near_tie; // of policies that don't decide by the tile's energies: whether `kept` could change
                                 // within the tolerance
};

// The keys that a policy gathers for a segment, one entry per key before the segment's own blocks.
struct KeyChoice {
  std::vector<double> energy; // up to a factor common to the segment; 0 for keys that are not ranked
  std::vector<uint8_t> kept, near_tie;
  int64_t wanted = 0; // as many would be kept if the list had room
};

// Everything that a method may read when it selects for one mask head of one sequence. V is not part of it: the one
// method that reads it (VSPrefill) loads it by itself.
struct HeadView {
  const Problem& problem;
  const Policy& policy;
  const Geometry& geometry;
  const Sequence& sequence;
  const Matrix& keys;
  const std::vector<Matrix>& queries; // of the heads whose rows lie in one tile
  int64_t first_head;                 // the first of these heads
};

class HeadSelector {
 public:
  virtual ~HeadSelector() = default;
  virtual TileChoice Choose(const Tile& tile) const = 0;
  // Keys finer than blocks, for all tiles: verticals and slashes, ascending.
  virtual void ChooseVerticalSlash(std::vector<int32_t>& /*verticals*/, std::vector<int32_t>& /*slashes*/) const {}
  // The key list of segment i.
  virtual KeyChoice ChooseKeys(int64_t /*i*/) const { return {}; }
};

// Scored blocks by energy, largest first, equal ones by index: the order that mass, gain and min_blocks go by.
std::vector<int64_t> Ranking(const TileChoice& choice);

// Sets choice.kept from energy, scored and rule.
void ApplyRule(TileChoice& choice);

// Select. Tests may pass observers, which are called for each tile that was scored and for each segment.
using Observer = std::function<void(const Sequence& s, int64_t mask_head, int64_t m, const TileChoice& choice)>;
using KeyObserver = std::function<void(const Sequence& s, int64_t mask_head, int64_t i, const KeyChoice& choice)>;
void Select(const Problem& p, const Policy& policy, BlockMask& mask, const Observer& observer = nullptr,
            const KeyObserver& key_observer = nullptr);

void Attend(const Problem& p, const BlockMask& mask, const Output& output);

// Fills in what the mask keeps of rows, which are in order by sequence and head.
void Audit(const Problem& p, const BlockMask& mask, std::span<AuditRow> rows);

// The keys that the mask's verticals and slashes, or its key lists, add to a tile, as flags.
std::vector<uint8_t> ExtraKeys(const Sequence& s, const Tile& tile, const VerticalSlash& extra, const KeyList& list);

} // namespace flashprefill::reference

#endif // FLASHPREFILL_REFERENCE_REFERENCE_H_
