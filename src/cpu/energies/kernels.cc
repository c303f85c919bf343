// Describing keys, loading query rows and scoring them, compiled once for each instruction set.
//
// The product keeps R rows x 2 vectors of blocks in registers and reads a panel front to back: of R + 2 loads for 2 R
// multiply-adds the R are broadcasts from L1, so the multiply-add units are what limits it. Scores never leave the
// registers: the maximum and the sum of powers of two are kept block by block, in vectors over blocks, so there is
// nothing to be reduced across lanes, and a new maximum costs one more power of two per block and R rows. Rows see
// their first blocks only, so a mask is a comparison with the lane's number, and is needed in a tile's last panels
// only.
#include "cpu/simd/targets.h"
// foreach_target.h reads all that follows it again for each target, so it comes before everything per-target.
// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/energies/kernels.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on
#include "cpu/energies/kernels.h"
#include "cpu/simd/exp2.h"
#include "cpu/simd/input_rows.h"

HWY_BEFORE_NAMESPACE();
namespace flashprefill::cpu::HWY_NAMESPACE {
namespace {

constexpr int kRows = HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON ? 8 : 4; // 2 kRows sums of 32 or 16 registers

// ---------------------------------------------------------------- describing keys

struct Column {
  float* panel;
  int at; // of the panel's blocks
  void Bias(int term, const EnergyPlan& plan, int head_dim, float value) const {
    Term(term, plan, head_dim)[at] = value;
  }
  float* Values(int term, const EnergyPlan& plan, int head_dim) const {
    return Term(term, plan, head_dim) + kPanelBlocks + at;
  }

 private:
  float* Term(int term, const EnergyPlan& plan, int head_dim) const {
    const int64_t before = term == 0 ? 0 : 1 + plan.depth + (term - 1) * int64_t{1 + head_dim};
    return panel + before * kPanelBlocks;
  }
};

Column ColumnOf(const EnergyPlan& plan, const Sequence& s, int64_t block, int head, float* panels) {
  const int64_t panel = head * plan.Panels(s) + block / kPanelBlocks;
  return {panels + panel * plan.panel_floats, static_cast<int>(block % kPanelBlocks)};
}

// The sum of n neighbouring elements.
template <int32_t DTYPE>
HWY_INLINE float SumOfRun(const Element<DTYPE>* from, int64_t n) {
  VF sum = hn::Zero(f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = hn::Add(sum, LoadVector(from, DTYPE, i));
  float rest = hn::GetLane(hn::SumOfLanes(f, sum));
  for (; i < n; ++i) rest += LoadElement(from, DTYPE, i);
  return rest;
}

// FlashPrefill's means. A token of all heads is one run of memory, so tokens are the outer loop, and the sums of all
// heads stay in L1. In caches that keep K transposed a dimension's tokens are neighbours, and each run of them is
// summed in a register.
template <int32_t DTYPE>
void DescribeMeans(const Problem& p, const EnergyPlan& plan, const Sequence& s, int64_t block, int head_begin,
                   int head_end, float* panels, float* sums) {
  const int64_t d = p.head_dim, heads = head_end - head_begin, keys = plan.g.BlockKeys(s, block);
  const int64_t first = block * plan.g.block_size;
  const int64_t token = p.k.stride[1], head_stride = p.k.stride[2], step = p.k.stride[3];
  std::fill_n(sums, heads * d, 0.f);
  ForRuns(p, s, first, first + keys, head_begin, [&](int64_t, int64_t n, int64_t offset) {
    const Element<DTYPE>* from = static_cast<const Element<DTYPE>*>(p.k.data) + offset;
    if (token == 1 && step != 1) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t i = 0; i < d; ++i) sums[h * d + i] += SumOfRun<DTYPE>(from + h * head_stride + i * step, n);
      }
      return;
    }
    for (int64_t t = 0; t < n; ++t, from += token) {
      for (int64_t h = 0; h < heads; ++h) {
        const Element<DTYPE>* row = from + h * head_stride;
        PrefetchRow(row + kAhead * token, d);
        TakeRow<DTYPE, true>(row, step, d, sums + h * d);
      }
    }
  });
  for (int64_t h = 0; h < heads; ++h) ScaleRow(KeyScale(p, s, head_begin + h), d, sums + h * d);
  const VF count = hn::Set(f, static_cast<float>(keys));
  MapRow(sums, heads * d, [&](VF x) { return Rounded(p.k.dtype, hn::Div(x, count)); });
  for (int64_t h = 0; h < heads; ++h) {
    const Column column = ColumnOf(plan, s, block, head_begin + static_cast<int>(h), panels);
    column.Bias(0, plan, p.head_dim, 0.f);
    float* values = column.Values(0, plan, p.head_dim);
    for (int64_t i = 0; i < d; ++i) values[i * kPanelBlocks] = sums[h * d + i];
  }
}

// The square of the distance between a and b, where a dimension counts weight[i].
HWY_INLINE float SquaredDistance(const float* HWY_RESTRICT a, const float* HWY_RESTRICT b,
                                 const float* HWY_RESTRICT weight, int64_t n) {
  VF sum0 = hn::Zero(f), sum1 = hn::Zero(f);
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const VF x = hn::Sub(hn::LoadU(f, a + i), hn::LoadU(f, b + i));
    const VF y = hn::Sub(hn::LoadU(f, a + i + kLanes), hn::LoadU(f, b + i + kLanes));
    sum0 = hn::MulAdd(hn::Mul(x, x), hn::LoadU(f, weight + i), sum0);
    sum1 = hn::MulAdd(hn::Mul(y, y), hn::LoadU(f, weight + i + kLanes), sum1);
  }
  float sum = hn::GetLane(hn::SumOfLanes(f, hn::Add(sum0, sum1)));
  for (; i < n; ++i) sum += (a[i] - b[i]) * (a[i] - b[i]) * weight[i];
  return sum;
}

// into[i] += from[i], or += (from[i] - center[i])^2
HWY_INLINE void AddRow(const float* HWY_RESTRICT from, int64_t n, float* HWY_RESTRICT into) {
  TakeRow<FP_F32, true>(from, 1, n, into);
}
HWY_INLINE void AddSquares(const float* HWY_RESTRICT from, const float* HWY_RESTRICT center, int64_t n,
                           float* HWY_RESTRICT into) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VF x = hn::Sub(hn::LoadU(f, from + i), hn::LoadU(f, center + i));
    hn::StoreU(hn::MulAdd(x, x, hn::LoadU(f, into + i)), f, into + i);
  }
  for (; i < n; ++i) into[i] += (from[i] - center[i]) * (from[i] - center[i]);
}

// Sketch's column of one head: outliers, then mean and variance of the other keys, from fp32 rows that stay in L2.
template <int32_t DTYPE>
void DescribeSketch(const Problem& p, const EnergyPlan& plan, const Sequence& s, int64_t block, int head,
                    const float* metric, float* panels, float* scratch) {
  const int64_t d = p.head_dim, n = plan.g.BlockKeys(s, block), first = block * plan.g.block_size;
  float* keys = scratch;                          // [n][d]
  float* distance = keys + plan.g.block_size * d; // [n]; below 0: an outlier
  float* mean = distance + plan.g.block_size;
  float* variance = mean + d;
  const Column column = ColumnOf(plan, s, block, head, panels);
  LoadKeys<DTYPE>(p, s, first, first + n, head, keys);

  const auto average = [&](float* sums, int64_t count) {
    const VF divisor = hn::Set(f, static_cast<float>(count));
    MapRow(sums, d, [&](VF x) { return hn::Div(x, divisor); });
  };
  const auto write = [&](int term, int64_t at, const float* from) {
    float* values = column.Values(term, plan, p.head_dim) + at * kPanelBlocks;
    for (int64_t i = 0; i < d; ++i) values[i * kPanelBlocks] = from[i];
  };
  const auto mean_of_rest = [&](int64_t count) {
    std::fill_n(mean, d, 0.f);
    for (int64_t t = 0; t < n; ++t) {
      if (distance[t] >= 0) AddRow(keys + t * d, d, mean);
    }
    average(mean, count);
  };

  const int64_t outliers = std::min<int64_t>(plan.outliers, n), rest = n - outliers;
  std::fill_n(distance, n, 0.f);
  if (rest == 0) {
    for (int term = 0; term < plan.terms; ++term) column.Bias(term, plan, p.head_dim, -INFINITY);
    std::fill_n(mean, d, 0.f);
    write(0, 0, mean), write(0, d, mean);
  }
  if (rest > 0 && outliers > 0) {
    mean_of_rest(n);
    for (int64_t t = 0; t < n; ++t) {
      const float x = SquaredDistance(keys + t * d, mean, metric, d);
      distance[t] = x >= 0 ? x : 0; // NaN is no distance
    }
  }
  for (int64_t o = 0; o < outliers; ++o) {
    const int64_t t = std::max_element(distance, distance + n) - distance; // the first of the largest
    column.Bias(1 + static_cast<int>(o), plan, p.head_dim, 0.f);
    write(1 + static_cast<int>(o), 0, keys + t * d);
    distance[t] = -1;
  }
  for (int64_t o = outliers; o < plan.outliers; ++o) {
    column.Bias(1 + static_cast<int>(o), plan, p.head_dim, -INFINITY);
    write(1 + static_cast<int>(o), 0, keys);
  }
  if (rest == 0) return;
  mean_of_rest(rest);
  std::fill_n(variance, d, 0.f);
  for (int64_t t = 0; t < n; ++t) {
    if (distance[t] >= 0) AddSquares(keys + t * d, mean, d, variance);
  }
  average(variance, rest);
  MapRow(variance, d, [&](VF x) { return Rounded(p.k.dtype, x); });
  MapRow(mean, d, [&](VF x) { return Rounded(p.k.dtype, x); });
  write(0, 0, mean), write(0, d, variance);
  column.Bias(0, plan, p.head_dim, std::log2(static_cast<float>(rest)));
}

void Describe(const Problem& p, const EnergyPlan& plan, const Sequence& s, int64_t begin, int64_t end, int head_begin,
              int head_end, const float* metric, float* panels, float* scratch) {
  WithDtype(p.k.dtype, [&]<int32_t DTYPE>(std::integral_constant<int32_t, DTYPE>) {
    for (int64_t block = begin; block < end; ++block) {
      if (!plan.variance) {
        DescribeMeans<DTYPE>(p, plan, s, block, head_begin, head_end, panels, scratch);
        continue;
      }
      for (int head = head_begin; head < head_end; ++head) {
        DescribeSketch<DTYPE>(p, plan, s, block, head, metric + int64_t{head} * p.head_dim, panels, scratch);
      }
    }
  });
}

// ---------------------------------------------------------------- loading query rows

template <int32_t DTYPE>
void LoadRowsOf(const Problem& p, const EnergyPlan& plan, const Sequence& s, int64_t begin, int64_t end, int head_begin,
                int head_end, float* rows) {
  const int64_t d = p.head_dim, pool = plan.query_pool, head_rows = plan.RowsPerHead(end - begin);
  const int heads = head_end - head_begin;
  const auto row_of = [&](int head, int64_t r) { return rows + (head * head_rows + r) * plan.depth; };
  const Element<DTYPE>* from =
      static_cast<const Element<DTYPE>*>(p.q.data) + RowOffset(p, p.q.stride, s, begin, head_begin);
  const VF scale = hn::Set(f, plan.exponent_scale);
  // 2^(c^2 ln2 / 2 ...) = exp(softmax_scale^2 / 2 ...)
  const VF square_scale = hn::Set(f, 0.5f * 0.69314718f * plan.exponent_scale * plan.exponent_scale);
  for (int64_t r = 0; r < head_rows; ++r) {
    const int64_t first = r * pool, tokens = std::min(pool, end - begin - first);
    for (int64_t t = 0; t < tokens; ++t, from += p.q.stride[1]) {
      for (int h = 0; h < heads; ++h) {
        const Element<DTYPE>* row = from + h * p.q.stride[2];
        PrefetchRow(row + kAhead * p.q.stride[1], d);
        if (t == 0) {
          TakeRow<DTYPE, false>(row, p.q.stride[3], d, row_of(h, r));
        } else {
          TakeRow<DTYPE, true>(row, p.q.stride[3], d, row_of(h, r));
        }
      }
    }
    const VF count = hn::Set(f, static_cast<float>(tokens));
    for (int h = 0; h < heads; ++h) {
      float* row = row_of(h, r);
      if (pool > 1) MapRow(row, d, [&](VF x) { return Rounded(p.q.dtype, hn::Div(x, count)); });
      if (plan.variance) {
        std::copy(row, row + d, row + d);
        MapRow(row + d, d, [&](VF x) { return hn::Mul(hn::Mul(x, x), square_scale); });
      }
      MapRow(row, d, [&](VF x) { return hn::Mul(x, scale); });
    }
  }
}

void LoadRows(const Problem& p, const EnergyPlan& plan, const Sequence& s, int64_t begin, int64_t end, int head_begin,
              int head_end, float* rows) {
  WithDtype(p.q.dtype, [&]<int32_t DTYPE>(std::integral_constant<int32_t, DTYPE>) {
    LoadRowsOf<DTYPE>(p, plan, s, begin, end, head_begin, head_end, rows);
  });
}

// ---------------------------------------------------------------- scoring

// R rows against C vectors of blocks of one term. MASK: some row does not see some of the blocks.
template <int R, int C, bool MASK>
HWY_INLINE void ScoreBlock(const float* HWY_RESTRICT rows, int64_t depth, int64_t row_stride,
                           const float* HWY_RESTRICT bias, const int32_t* visible, int first,
                           float* HWY_RESTRICT largest, float* HWY_RESTRICT sums) {
  const float* HWY_RESTRICT values = bias + kPanelBlocks;
  VF z[C][R];
  HWY_UNROLL(8)
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) z[c][r] = hn::Load(f, bias + c * kLanes);
  }
  for (int64_t i = 0; i < depth; ++i, values += kPanelBlocks) {
    VF b[C];
    for (int c = 0; c < C; ++c) b[c] = hn::Load(f, values + c * kLanes);
    HWY_UNROLL(8)
    for (int r = 0; r < R; ++r) {
      const VF a = hn::Set(f, rows[r * row_stride + i]);
      for (int c = 0; c < C; ++c) z[c][r] = hn::MulAdd(a, b[c], z[c][r]);
    }
  }
  HWY_UNROLL(2)
  for (int c = 0; c < C; ++c) {
    // One multiply-add a vector finds out whether any score is infinite or NaN: nearly always none is.
    VF nothing = hn::Zero(f);
    HWY_UNROLL(8)
    for (int r = 0; r < R; ++r) nothing = hn::MulAdd(z[c][r], hn::Zero(f), nothing);
    if (MASK || !hn::AllTrue(f, hn::Eq(nothing, hn::Zero(f)))) {
      const VF finite = hn::Set(f, 3.4028235e38f), never = hn::Set(f, -INFINITY);
      const VF lane = hn::Iota(f, static_cast<float>(first + c * kLanes));
      HWY_UNROLL(8)
      for (int r = 0; r < R; ++r) {
        const auto seen = hn::Lt(lane, hn::Set(f, static_cast<float>(visible[r])));
        z[c][r] = hn::IfThenElse(hn::And(seen, hn::Le(hn::Abs(z[c][r]), finite)), z[c][r], never);
      }
    }
    const VF before = hn::Load(f, largest + c * kLanes);
    VF top = before;
    HWY_UNROLL(8)
    for (int r = 0; r < R; ++r) top = hn::Max(top, z[c][r]);
    VF sum = hn::Mul(hn::Load(f, sums + c * kLanes), Exp2(hn::Sub(before, top)));
    HWY_UNROLL(8)
    for (int r = 0; r < R; ++r) sum = hn::Add(sum, Exp2(hn::Sub(z[c][r], top)));
    hn::Store(top, f, largest + c * kLanes);
    hn::Store(sum, f, sums + c * kLanes);
  }
}

// R rows against a panel, as far as any of them sees it.
template <int R>
HWY_INLINE void ScoreRows(const Problem& p, const EnergyPlan& plan, const float* panel, const float* rows,
                          const int32_t* visible, float* largest, float* sums) {
  const int32_t least = *std::min_element(visible, visible + R), most = *std::max_element(visible, visible + R);
  for (int term = 0; term < plan.terms; ++term) {
    const int64_t depth = term == 0 ? plan.depth : p.head_dim;
    const auto score = [&]<int C, bool MASK>(int first) {
      ScoreBlock<R, C, MASK>(rows, depth, plan.depth, panel + first, visible, first, largest + first, sums + first);
    };
    int first = 0;
    for (; first + kLanes < most; first += 2 * kLanes) {
      if (least >= first + 2 * kLanes) {
        score.template operator()<2, false>(first);
      } else {
        score.template operator()<2, true>(first);
      }
    }
    if (first < most) score.template operator()<1, true>(first);
    panel += (1 + depth) * kPanelBlocks;
  }
}

void Score(const Problem& p, const EnergyPlan& plan, const float* panel, const float* rows, int n,
           const int32_t* visible, float* largest, float* sums) {
  int r = 0;
  const auto run = [&]<int R>(std::integral_constant<int, R>) {
    for (; r + R <= n; r += R) {
      ScoreRows<R>(p, plan, panel, rows + int64_t{r} * plan.depth, visible + r, largest, sums);
    }
  };
  if constexpr (kRows == 8) run(std::integral_constant<int, 8>());
  run(std::integral_constant<int, 4>());
  run(std::integral_constant<int, 2>());
  run(std::integral_constant<int, 1>());
}

float Energies(int64_t blocks, const float* largest, float* sums) {
  // Both arrays are whole panels, but what lies behind `blocks` in them says nothing.
  float top = kNothing;
  for (int64_t b = 0; b < blocks; ++b) top = std::max(top, largest[b]);
  const VF reference = hn::Set(f, top);
  for (int64_t b = 0; b < blocks; b += kLanes) {
    const VF factor = Exp2(hn::Sub(hn::Load(f, largest + b), reference));
    hn::Store(hn::Mul(hn::Load(f, sums + b), factor), f, sums + b);
  }
  return *std::max_element(sums, sums + blocks);
}

} // namespace

constexpr EnergyKernels kEnergyKernels = {Describe, LoadRows, Score, Energies};

} // namespace flashprefill::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
FLASHPREFILL_EXPORT_KERNELS(EnergyKernels)
#endif
