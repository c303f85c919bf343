// See top_p.h. An item is near a tie unless the answer stays the same however items of nearly equal mass are ordered,
// and with sums a little larger or smaller.
#include "reference/top_p.h"

#include <algorithm>
#include <functional>

namespace flashprefill::reference {
namespace {

std::vector<size_t> ByMass(const std::vector<double>& mass, const std::vector<uint8_t>& first) {
  std::vector<size_t> order;
  for (size_t i = 0; i < mass.size(); ++i) {
    if (first.empty() || !first[i]) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return mass[a] > mass[b]; });
  return order;
}

// The items that rank before one: those that surely do, and those that may.
struct Before {
  int64_t surely = 0, perhaps = 0;
  double surely_sum = 0, perhaps_sum = 0;
};

// Sets near_tie[i] unless the item is surely in or surely out.
void MarkNearTies(const std::vector<double>& mass, const std::vector<size_t>& order, double tolerance,
                  const std::function<bool(size_t, const Before&)>& surely_in,
                  const std::function<bool(size_t, const Before&)>& surely_out, Verdict& verdict) {
  for (const size_t i : order) {
    Before before;
    for (const size_t other : order) {
      if (other == i) continue;
      if (mass[other] > mass[i] * (1 + tolerance)) before.surely_sum += mass[other], ++before.surely;
      if (mass[other] >= mass[i] * (1 - tolerance)) before.perhaps_sum += mass[other], ++before.perhaps;
    }
    verdict.near_tie[i] = !surely_in(i, before) && !surely_out(i, before);
  }
}

Verdict Nothing(size_t n) { return {std::vector<uint8_t>(n), std::vector<uint8_t>(n)}; }

} // namespace

Verdict TopP(const std::vector<double>& mass, double share, const std::vector<uint8_t>& first, double tolerance) {
  Verdict verdict = Nothing(mass.size());
  double first_sum = 0;
  for (size_t i = 0; i < first.size(); ++i) {
    if (first[i]) verdict.kept[i] = 1, first_sum += mass[i];
  }
  const std::vector<size_t> order = ByMass(mass, first);
  double total = first_sum;
  for (const size_t i : order) total += mass[i];
  if (share >= 1) { // sums of rounded masses, or masses that are 0, would end before
    std::fill(verdict.kept.begin(), verdict.kept.end(), 1);
    return verdict;
  }
  double sum = first_sum;
  for (const size_t i : order) {
    if (sum >= share * total) break;
    verdict.kept[i] = 1;
    sum += mass[i];
  }
  MarkNearTies(
      mass, order, tolerance,
      [&](size_t, const Before& b) { return first_sum + b.perhaps_sum < (share - tolerance) * total; },
      [&](size_t, const Before& b) { return first_sum + b.surely_sum >= (share + tolerance) * total; }, verdict);
  return verdict;
}

Verdict TopPExclusive(const std::vector<double>& mass, double share, double tolerance) {
  Verdict verdict = Nothing(mass.size());
  const std::vector<size_t> order = ByMass(mass, {});
  double total = 0, sum = 0;
  for (const size_t i : order) total += mass[i];
  for (const size_t i : order) {
    sum += mass[i];
    if (sum > share * total && i != order.front()) break;
    verdict.kept[i] = 1;
  }
  MarkNearTies(
      mass, order, tolerance,
      [&](size_t i, const Before& b) {
        return b.perhaps == 0 || b.perhaps_sum + mass[i] <= (share - tolerance) * total;
      },
      [&](size_t i, const Before& b) { return b.surely > 0 && b.surely_sum + mass[i] > (share + tolerance) * total; },
      verdict);
  return verdict;
}

Verdict TopK(const std::vector<double>& mass, int64_t count, double tolerance) {
  Verdict verdict = Nothing(mass.size());
  const std::vector<size_t> order = ByMass(mass, {});
  for (size_t i = 0; i < order.size() && static_cast<int64_t>(i) < count; ++i) verdict.kept[order[i]] = 1;
  MarkNearTies(
      mass, order, tolerance, [&](size_t, const Before& b) { return b.perhaps < count; },
      [&](size_t, const Before& b) { return b.surely >= count; }, verdict);
  return verdict;
}

Verdict Union(const Verdict& a, const Verdict& b) {
  Verdict both = Nothing(a.kept.size());
  for (size_t i = 0; i < a.kept.size(); ++i) {
    const bool sure = (a.kept[i] && !a.near_tie[i]) || (b.kept[i] && !b.near_tie[i]);
    both.kept[i] = a.kept[i] || b.kept[i];
    both.near_tie[i] = !sure && (a.near_tie[i] || b.near_tie[i]);
  }
  return both;
}

} // namespace flashprefill::reference
