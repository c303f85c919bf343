// S2O: for each segment of query tokens, the keys before its window in the order of the segment's mean query
// (reference/ranked_keys.h), 128 at a time, until they add too little. What a group of keys adds to a row is the
// sum of its exponentials, over the sum of those that the row has already: of the keys in its tile's blocks, and of the
// groups before. Where the mean of that over stop_rows rows of each head of the list is below tau for two groups in a
// row, these are the last. Products that are not finite count for nothing, and neither do rows without others.
#include "core/stop_rows.h"
#include "reference/ranked_keys.h"

namespace flashprefill::methods::s2o {
namespace {

using reference::Matrix;

// One row's sum of exponentials, relative to the largest.
struct Sum {
  double largest = -std::numeric_limits<double>::infinity(), sum = 0;

  void Add(double z) {
    if (!std::isfinite(z)) return;
    if (z > largest) sum *= std::exp(largest - z), largest = z;
    sum += std::exp(z - largest);
  }
  void Add(const Sum& other) {
    if (other.sum == 0) return;
    const double most = std::max(largest, other.largest);
    sum = sum * std::exp(largest - most) + other.sum * std::exp(other.largest - most);
    largest = most;
  }
};

struct Row {
  const double* query;
  Sum sum; // so far
};

class S2O : public reference::RankedKeys {
 public:
  explicit S2O(const reference::HeadView& head)
      : RankedKeys(head, reinterpret_cast<const fp_s2o&>(head.policy).segment),
        policy_(reinterpret_cast<const fp_s2o&>(head.policy)) {}

 private:
  double Score(const Row& row, int64_t key) const {
    return head_.problem.softmax_scale * reference::Dot(row.query, head_.keys[key], head_.keys.columns);
  }

  // The rows that decide, and what the keys in their blocks sum up to.
  std::vector<Row> RowsOf(const Segment& segment) const {
    std::vector<Row> rows;
    const int64_t count = StopRows(policy_.stop_rows, segment);
    for (const Matrix& queries : head_.queries) {
      for (int64_t r = 0; r < count; ++r) {
        const int64_t i = StopRow(segment, r, count);
        Row row{queries[i], {}};
        for (int64_t t = 0; t <= head_.sequence.prefix + i; ++t) {
          if (t < segment.first_key || t >= segment.end_key) row.sum.Add(Score(row, t));
        }
        rows.push_back(row);
      }
    }
    return rows;
  }

  // Adds keys to the rows. Returns the mean of what they add over what there was.
  double Ratio(std::vector<Row>& rows, const int64_t* keys, int64_t count) const {
    double ratios = 0;
    int64_t counted = 0;
    for (Row& row : rows) {
      Sum added;
      for (int64_t k = 0; k < count; ++k) added.Add(Score(row, keys[k]));
      if (row.sum.sum > 0 || added.sum > 0) {
        ratios += added.sum == 0 ? 0 : added.sum / row.sum.sum * std::exp(added.largest - row.sum.largest);
        ++counted;
      }
      row.sum.Add(added);
    }
    return counted == 0 ? 0 : ratios / static_cast<double>(counted);
  }

  void Keep(const Segment& segment, const std::vector<int64_t>& order, reference::KeyChoice& choice) const override {
    const int64_t ranked = static_cast<int64_t>(order.size());
    const int64_t room = std::min<int64_t>(ranked, policy_.max_keys);
    if (ranked == 0) return;
    std::vector<Row> rows = RowsOf(segment);
    // By the ratios as they are, and as they might be a little larger or smaller: of keys whose energies are near each
    // other any may be in the one group or in the next.
    const double factor[3] = {1, 1 + 60 * Tolerance(), 1 - 60 * Tolerance()};
    int64_t end[3] = {-1, -1, -1};
    int below[3] = {};
    for (int64_t first = 0; first < room; first += kGroupKeys) {
      const int64_t count = std::min(kGroupKeys, room - first);
      const double ratio = Ratio(rows, order.data() + first, count);
      for (int i = 0; i < 3; ++i) {
        below[i] = ratio < policy_.tau * factor[i] ? below[i] + 1 : 0;
        if (below[i] == kGroupsBelow && end[i] < 0) end[i] = first + count;
      }
    }
    choice.wanted = end[0];
    if (end[0] < 0) choice.wanted = room + (room < ranked); // it did not stop: one more, at least
    for (int64_t& e : end) e = e < 0 ? room : e;
    for (int64_t rank = 0; rank < end[0]; ++rank) choice.kept[order[rank]] = 1;
    for (int64_t rank = end[1]; rank < end[2]; ++rank) choice.near_tie[order[rank]] = 1;
    for (const int64_t cut : {end[0], end[1], end[2]}) {
      if (cut == ranked) continue;
      for (const int64_t key : order) {
        for (const int64_t at : {cut - 1, cut}) {
          const double e = choice.energy[order[at]];
          if (std::abs(choice.energy[key] - e) <= e * Tolerance() + 1e-18) choice.near_tie[key] = 1;
        }
      }
    }
  }

  const fp_s2o& policy_;
};

} // namespace

extern const reference::Selector kReference = {reference::Make<S2O>};

} // namespace flashprefill::methods::s2o
