// Scoring cells of keys, compiled once for each instruction set: see kernels.h.
//
// The product keeps R cells x 2 vectors of rows in registers. Of its R + 2 loads for 2 R multiply-adds R are broadcasts
// from cells, which stay in L1 or L2, and the panel is read front to back: at a stride of 16 and 128 dimensions it is
// 256 KiB, and L2 delivers its 128 bytes in the eight cycles that the products take.
#include "cpu/simd/targets.h"
// foreach_target.h reads all that follows it again for each target, so it comes before everything per-target.
// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/strided/kernels.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on
#include "cpu/energies/kernels.h"
#include "cpu/simd/exp2.h"
#include "cpu/simd/input_rows.h"
#include "cpu/strided/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace flashprefill::cpu::HWY_NAMESPACE {
namespace {

constexpr int kCells = HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON ? 8 : 4; // 2 kCells sums of 32 or 16 registers

void LoadKeyRows(const Problem& p, const Sequence& s, int head, int64_t begin, int64_t end, float* rows) {
  WithDtype(p.k.dtype, [&]<int32_t DTYPE>(std::integral_constant<int32_t, DTYPE>) {
    LoadKeys<DTYPE>(p, s, begin, end, head, rows);
  });
}

template <int32_t DTYPE>
void MeanKeysOf(const Problem& p, const Sequence& s, int head, int stride, int64_t begin, int64_t count, float* cells) {
  const int64_t d = p.head_dim;
  for (int64_t c = 0; c < count; ++c, begin += stride, cells += d) {
    const int64_t end = std::min(begin + stride, s.k_len);
    std::fill_n(cells, d, 0.f);
    ForRuns(p, s, begin, end, head, [&](int64_t, int64_t n, int64_t offset) {
      const Element<DTYPE>* from = static_cast<const Element<DTYPE>*>(p.k.data) + offset;
      for (int64_t t = 0; t < n; ++t, from += p.k.stride[1]) {
        PrefetchRow(from + kAhead * p.k.stride[1], d);
        TakeRow<DTYPE, true>(from, p.k.stride[3], d, cells);
      }
    });
    ScaleRow(KeyScale(p, s, head), d, cells);
    const VF keys = hn::Set(f, static_cast<float>(end - begin));
    MapRow(cells, d, [&](VF x) { return Rounded(DTYPE, hn::Div(x, keys)); });
  }
}

void MeanKeys(const Problem& p, const Sequence& s, int head, int stride, int64_t begin, int64_t count, float* cells) {
  WithDtype(p.k.dtype, [&]<int32_t DTYPE>(std::integral_constant<int32_t, DTYPE>) {
    MeanKeysOf<DTYPE>(p, s, head, stride, begin, count, cells);
  });
}

void LoadQuery(const Problem& p, const Sequence& s, int64_t i, int head, float factor, float* row) {
  WithDtype(p.q.dtype, [&]<int32_t DTYPE>(std::integral_constant<int32_t, DTYPE>) {
    const Element<DTYPE>* from = static_cast<const Element<DTYPE>*>(p.q.data) + RowOffset(p, p.q.stride, s, i, head);
    TakeRow<DTYPE, false>(from, p.q.stride[3], p.head_dim, row);
  });
  const VF scale = hn::Set(f, factor);
  MapRow(row, p.head_dim, [&](VF x) { return hn::Mul(x, scale); });
}

// R cells against C vectors of rows.
template <int R, int C>
HWY_INLINE void ScoreCells(const float* HWY_RESTRICT panel, const float* HWY_RESTRICT cells, int64_t pitch,
                           int64_t depth, int64_t first, const float* HWY_RESTRICT visible, float* HWY_RESTRICT largest,
                           float* HWY_RESTRICT sums) {
  VF z[C][R];
  HWY_UNROLL(8)
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) z[c][r] = hn::Zero(f);
  }
  for (int64_t i = 0; i < depth; ++i, panel += kStridedLanes) {
    VF q[C];
    for (int c = 0; c < C; ++c) q[c] = hn::Load(f, panel + c * kLanes);
    HWY_UNROLL(8)
    for (int r = 0; r < R; ++r) {
      const VF k = hn::Set(f, cells[r * pitch + i]);
      for (int c = 0; c < C; ++c) z[c][r] = hn::MulAdd(k, q[c], z[c][r]);
    }
  }
  const VF finite = hn::Set(f, 3.4028235e38f), never = hn::Set(f, -INFINITY);
  HWY_UNROLL(2)
  for (int c = 0; c < C; ++c) {
    const VF seen = hn::Load(f, visible + c * kLanes), before = hn::Load(f, largest + c * kLanes);
    VF top = before;
    HWY_UNROLL(8)
    for (int r = 0; r < R; ++r) {
      const auto counts =
          hn::And(hn::Gt(seen, hn::Set(f, static_cast<float>(first + r))), hn::Le(hn::Abs(z[c][r]), finite));
      z[c][r] = hn::IfThenElse(counts, z[c][r], never);
      top = hn::Max(top, z[c][r]);
    }
    VF sum = hn::Mul(hn::Load(f, sums + c * kLanes), Exp2(hn::Sub(before, top)));
    HWY_UNROLL(8)
    for (int r = 0; r < R; ++r) sum = hn::Add(sum, Exp2(hn::Sub(z[c][r], top)));
    hn::Store(top, f, largest + c * kLanes);
    hn::Store(sum, f, sums + c * kLanes);
  }
}

void Score(const float* panel, const float* cells, int64_t pitch, int64_t depth, int64_t first, int n,
           const float* visible, float* largest, float* sums) {
  int r = 0;
  const auto run = [&]<int R>(std::integral_constant<int, R>) {
    for (; r + R <= n; r += R) {
      for (int lane = 0; lane < kStridedLanes; lane += 2 * kLanes) {
        ScoreCells<R, 2>(panel + lane, cells + r * pitch, pitch, depth, first + r, visible + lane, largest + lane,
                         sums + lane);
      }
    }
  };
  if constexpr (kCells == 8) run(std::integral_constant<int, 8>());
  run(std::integral_constant<int, 4>());
  run(std::integral_constant<int, 2>());
  run(std::integral_constant<int, 1>());
}

void Normalise(int64_t blocks, const float* largest, float* sums) {
  for (int lane = 0; lane < kStridedLanes; lane += kLanes) {
    VF top = hn::Set(f, kNothing), total = hn::Zero(f);
    for (int64_t b = 0; b < blocks; ++b) top = hn::Max(top, hn::Load(f, largest + b * kStridedLanes + lane));
    for (int64_t b = 0; b < blocks; ++b) {
      float* sum = sums + b * kStridedLanes + lane;
      const VF scaled = hn::Mul(hn::Load(f, sum), Exp2(hn::Sub(hn::Load(f, largest + b * kStridedLanes + lane), top)));
      hn::Store(scaled, f, sum);
      total = hn::Add(total, scaled);
    }
    const VF share = hn::IfThenElseZero(hn::Gt(total, hn::Zero(f)), hn::Div(hn::Set(f, 1.f), total));
    for (int64_t b = 0; b < blocks; ++b) {
      float* sum = sums + b * kStridedLanes + lane;
      hn::Store(hn::Mul(hn::Load(f, sum), share), f, sum);
    }
  }
}

} // namespace

constexpr StridedKernels kStridedKernels = {LoadKeyRows, MeanKeys, LoadQuery, Score, Normalise};

} // namespace flashprefill::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
FLASHPREFILL_EXPORT_KERNELS(StridedKernels)
#endif
