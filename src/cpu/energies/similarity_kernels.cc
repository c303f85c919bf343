// The mean cosine of a block's tokens in one pass over its rows, compiled once for each instruction set. The n x n
// matrix of cosines that the paper takes the mean of is never made: its mean is |sum of unit vectors|^2 / n^2.
#include "cpu/simd/targets.h"
// foreach_target.h reads all that follows it again for each target, so it comes before everything per-target.
// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/energies/similarity_kernels.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on
#include "cpu/energies/similarity_kernels.h"
#include "cpu/simd/input_rows.h"

HWY_BEFORE_NAMESPACE();
namespace flashprefill::cpu::HWY_NAMESPACE {
namespace {

void AddRows(const float* rows, int64_t n, int64_t d, float* sum) {
  for (int64_t r = 0; r < n; ++r) TakeRow<FP_F32, true>(rows + r * d, 1, d, sum);
}

HWY_INLINE float SquaredLength(const float* HWY_RESTRICT row, const float* HWY_RESTRICT center, int64_t d) {
  VF sum = hn::Zero(f);
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    const VF x = hn::Sub(hn::LoadU(f, row + i), hn::LoadU(f, center + i));
    sum = hn::MulAdd(x, x, sum);
  }
  float length = hn::GetLane(hn::SumOfLanes(f, sum));
  for (; i < d; ++i) length += (row[i] - center[i]) * (row[i] - center[i]);
  return length;
}

float Similarity(const float* rows, int64_t n, int64_t d, const float* center, float* HWY_RESTRICT sum) {
  std::fill_n(sum, d, 0.f);
  for (int64_t r = 0; r < n; ++r, rows += d) {
    const float squared = SquaredLength(rows, center, d);
    if (squared == 0) continue;
    const float unit = 1 / std::sqrt(squared);
    const VF scale = hn::Set(f, unit);
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {
      const VF x = hn::Sub(hn::LoadU(f, rows + i), hn::LoadU(f, center + i));
      hn::StoreU(hn::MulAdd(x, scale, hn::LoadU(f, sum + i)), f, sum + i);
    }
    for (; i < d; ++i) sum[i] += (rows[i] - center[i]) * unit;
  }
  double squared = 0;
  for (int64_t i = 0; i < d; ++i) squared += double{sum[i]} * sum[i];
  return static_cast<float>(squared / (static_cast<double>(n) * static_cast<double>(n)));
}

} // namespace

constexpr SimilarityKernels kSimilarityKernels = {AddRows, Similarity};

} // namespace flashprefill::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
FLASHPREFILL_EXPORT_KERNELS(SimilarityKernels)
#endif
