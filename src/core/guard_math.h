// The guard's arithmetic, one for the host and for CUDA kernels: how many rows are audited, which ones are drawn, and
// the bounds that follow from what they keep. core/audit.cc and cuda/common/guard/ go over rows by it.
#ifndef FLASHPREFILL_CORE_GUARD_MATH_H_
#define FLASHPREFILL_CORE_GUARD_MATH_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/host_device.h"
#include "core/philox.h"

namespace flashprefill {

constexpr int64_t kRowsPerAudit = 2048; // of a prompt
constexpr int64_t kLeastPerPrompt = 32, kLeastPerCall = 8;
constexpr double kBadRecall = 0.5, kBadShare = 0.05;

// Rows that are audited of a sequence and head, if its mask leaves something out of as many. rows: fp_guard's.
FLASHPREFILL_HOST_DEVICE inline int64_t GuardRowsOf(int64_t rows, bool causal, int64_t q_len, int64_t k_len) {
  if (rows > 0) return std::min(rows, q_len);
  const int64_t least_per_prompt = kLeastPerPrompt, least = kLeastPerCall; // std::max takes addresses
  // A prompt's rows, shared out to its chunks.
  const int64_t prompt = std::max(least_per_prompt, k_len / kRowsPerAudit);
  const int64_t share = causal && k_len > 0 ? (prompt * q_len + k_len - 1) / k_len : prompt;
  return std::min(std::max(least, share), q_len);
}

// The most that GuardRowsOf says for lengths up to these.
inline int64_t MostGuardRows(int64_t rows, bool causal, int64_t max_q, int64_t max_k) {
  if (rows > 0) return std::min(rows, max_q);
  const int64_t longest = causal ? max_q + kRowsPerAudit - 1 : max_k;
  return std::min(std::max(kLeastPerPrompt, longest / kRowsPerAudit), max_q);
}

// What draws depend on.
struct GuardSeed {
  uint64_t seed;
  int32_t layer;
  int32_t draw; // of a call's audits
};

// The row of stratum j of `strata`, counted over the `sparse` rows whose tile leaves something out.
FLASHPREFILL_HOST_DEVICE inline int64_t DrawnRow(const GuardSeed& from, int64_t sequence, int64_t prefix, int64_t head,
                                                 int64_t j, int64_t sparse, int64_t strata) {
  const int64_t begin = j * sparse / strata, end = (j + 1) * sparse / strata;
  uint32_t words[4] = {static_cast<uint32_t>(j), static_cast<uint32_t>(head), static_cast<uint32_t>(sequence),
                       static_cast<uint32_t>(from.layer) * 2 + static_cast<uint32_t>(from.draw)};
  PhiloxRounds(words, from.seed ^ static_cast<uint64_t>(prefix) << 32);
  return begin + static_cast<int64_t>(static_cast<uint64_t>(words[0]) * static_cast<uint64_t>(end - begin) >> 32);
}

// Rows of stratum j. Strata differ by a row at most; with their sizes as weights, all rows audited give the mean of all
// rows.
FLASHPREFILL_HOST_DEVICE inline int64_t StratumRows(int64_t j, int64_t sparse, int64_t strata) {
  return (j + 1) * sparse / strata - j * sparse / strata;
}

// Student's t at 95 %, one-sided, from the normal quantile (Abramowitz and Stegun 26.7.5): within 1 % from 3 on.
FLASHPREFILL_HOST_DEVICE inline double TQuantile(double freedom) {
  constexpr double z = 1.6448536269514722, z3 = z * z * z, z5 = z3 * z * z;
  return z + (z3 + z) / (4 * freedom) + (5 * z5 + 16 * z3 + 3 * z) / (96 * freedom * freedom);
}

// The lower bound of a head's recall: Student's t with one row more than was audited, which loses half as much again as
// the worst of them. Recalls are skewed: most rows lose little and a few lose much, and a plain t misses those that
// were not drawn. Over 22,680 audits of 32 rows of real heads (bench/lab/guard.py's) it was right in 88 %, and with
// that row in 97 %.
struct LowerBound {
  double unseen, mean; // that row's recall; the mean with it

  static FLASHPREFILL_HOST_DEVICE LowerBound Of(double count, double recall, double worst) {
    const double unseen = std::max(0.0, 1 - 1.5 * (1 - worst));
    return {unseen, (recall * count + unseen) / (count + 1)};
  }
  // squares: sum over the audited rows of (recall - mean)^2.
  FLASHPREFILL_HOST_DEVICE double From(double count, double squares) const {
    if (count < 2) return 0;
    const double all = squares + (unseen - mean) * (unseen - mean);
    return std::max(0.0, mean - TQuantile(count) * std::sqrt(all / count / (count + 1)));
  }
};

// A percentile as NumPy has it: between neighbours, values[below] and values[below + 1] of those in order, by the
// distance from them.
struct PercentilePlace {
  int64_t below;
  double share;

  static FLASHPREFILL_HOST_DEVICE PercentilePlace Of(double percentile, int64_t count) {
    const double at = percentile * static_cast<double>(count - 1);
    const int64_t below = static_cast<int64_t>(at);
    return {below, at - static_cast<double>(below)};
  }
  FLASHPREFILL_HOST_DEVICE int64_t above(int64_t count) const { return std::min(below + 1, count - 1); }
};

// Whether a head keeps too little.
FLASHPREFILL_HOST_DEVICE inline bool KeepsTooLittle(double low, double target, int64_t bad, int64_t count) {
  return low < target || static_cast<double>(bad) > kBadShare * static_cast<double>(count);
}

struct Moments {
  double count = 0, sum = 0, squares = 0; // of the rows' recalls

  FLASHPREFILL_HOST_DEVICE void Add(const Moments& other) {
    count += other.count;
    sum += other.sum;
    squares += other.squares;
  }
};

// Lower bound of the mean of independent values in [0, 1] (Maurer and Pontil, "Empirical Bernstein bounds and sample
// variance penalization", COLT 2009, theorem 11); 0 where there are too few of them, 1 where there are none.
FLASHPREFILL_HOST_DEVICE inline double Certificate(const Moments& m, double risk) {
  if (m.count == 0) return 1;
  if (m.count < 2) return 0;
  const double mean = m.sum / m.count;
  const double variance = std::max(0.0, m.squares - m.sum * mean) / (m.count - 1);
  const double log = std::log(2 / risk);
  return std::max(0.0, mean - std::sqrt(2 * variance * log / m.count) - 7 * log / (3 * (m.count - 1)));
}

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_GUARD_MATH_H_
