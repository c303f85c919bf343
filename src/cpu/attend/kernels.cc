// Attend in fp32 for every instruction set of Highway: 16-bit inputs are converted when they are packed.
//
// Both products, Q K^T and P V, are one micro-kernel: C[MR][NV vectors] += A[MR][depth] B[depth][NV vectors], its C in
// registers, a row of B loaded as NV vectors, elements of A broadcast. AVX-512 holds 8 x 32 (16 of 32 registers), AVX2
// 6 x 16 (12 of 16), NEON 6 x 16 (24 of 32). A multiply-add then needs two thirds of a load at most, and cores do as
// many of both in a cycle, so that the multiply-add units are the limit. Between the products the weights stay in the
// cache: a chunk of 128 keys is scored, exponentiated and multiplied with V for a few rows at a time.
#include "cpu/attend/kernels.h"

#include <cmath>
#include <limits>

#include "cpu/simd/targets.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attend/kernels.cc"
#include "hwy/foreach_target.h"
#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "cpu/simd/rows.h" // after highway.h, in each pass
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace flashprefill::cpu::HWY_NAMESPACE {
namespace {

#if HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128
constexpr int kRows = 1; // no registers to block for
constexpr int kVectors = kLeast / kLanes;
#elif HWY_TARGET <= HWY_AVX3
constexpr int kRows = 8;
constexpr int kVectors = 2;
#else
constexpr int kRows = 6;
constexpr int kVectors = kLeast / kLanes; // 2 for AVX2, 4 for NEON
#endif
constexpr int kPanel = kVectors * kLanes; // keys of a panel of K, columns of a panel of V
static_assert(kGroup % kPanel == 0 && kPanel % kLeast == 0, "see kernels.h");

// Rows that go through both products together: their scores (144 floats each) stay in the L1 cache beside a panel.
constexpr int kStrip = 48;
static_assert(kStrip <= kMaxStrip, "the scratch for scores has so many rows");

using Element = float;
constexpr int kPerElement = 1;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---------------------------------------------------------------- the micro-kernel

// `ahead` is fetched meanwhile, a line for every kAheadStep rows of B: the last level cache is too far away to be
// waited for, and more lines at once would hold up the loads of B.
constexpr int kAheadStep = 8;
constexpr int kLine = 16; // floats

template <int ROWS, int VECTORS, bool ADD>
void Micro(const float* HWY_RESTRICT a, int64_t a_stride, const float* HWY_RESTRICT b, int64_t b_stride, int64_t depth,
           float* HWY_RESTRICT c, int64_t c_stride, const float* ahead) {
  const DF df;
  VF sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) sum[r][j] = hn::Zero(df);
  }
  auto step = [&](int64_t k) HWY_ATTR {
    VF row[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) row[j] = hn::LoadU(df, b + k * b_stride + j * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const VF x = hn::Set(df, a[r * a_stride + k]);
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) sum[r][j] = hn::MulAdd(x, row[j], sum[r][j]);
    }
  };
  int64_t k = 0;
  for (; k + kAheadStep <= depth; ahead += kLine) {
    __builtin_prefetch(ahead, 0, 2); // into L2
    for (const int64_t end = k + kAheadStep; k < end; ++k) step(k);
  }
  for (; k < depth; ++k) step(k);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
      float* to = c + r * c_stride + j * kLanes;
      hn::StoreU(ADD ? hn::Add(sum[r][j], hn::LoadU(df, to)) : sum[r][j], df, to);
    }
  }
}

// of[rows - 1][vectors - 1]
struct MicroTable {
  decltype(&Micro<1, 1, false>) of[kRows][kVectors];
};

template <bool ADD, int... I>
constexpr MicroTable MakeMicroTable(std::integer_sequence<int, I...>) {
  MicroTable table{};
  ((table.of[I / kVectors][I % kVectors] = Micro<I / kVectors + 1, I % kVectors + 1, ADD>), ...);
  return table;
}
constexpr MicroTable kMultiply = MakeMicroTable<false>(std::make_integer_sequence<int, kRows * kVectors>());
constexpr MicroTable kMultiplyAdd = MakeMicroTable<true>(std::make_integer_sequence<int, kRows * kVectors>());

// ---------------------------------------------------------------- the phases of a chunk

#include "cpu/attend/phases.inc"

// ---------------------------------------------------------------- packing

void LoadQueries(const Rows& rows, int32_t head_dim, void* q) {
  const int64_t stride = QueryStride(head_dim);
  for (int32_t i = 0; i < rows.count; ++i) {
    LoadRow(rows.data, rows.dtype, rows.offset[i], rows.step, head_dim, ValueWidth(head_dim),
            static_cast<float*>(q) + i * stride);
  }
}

// The row's elements as fp32; zeros if there is no such row.
HWY_INLINE void LoadOrZero(const Rows& rows, int32_t i, int64_t count, int64_t padded, float* to) {
  if (i < rows.count) {
    LoadRow(rows.data, rows.dtype, rows.offset[i], rows.step, count, padded, to, rows.scale);
  } else {
    std::fill(to, to + padded, 0.0f);
  }
}

// Turns 4 rows of fp32 into columns [0, 4) of a panel of K, 4 x 4 elements at a time.
HWY_INLINE void StoreColumns(const float* rows, int64_t stride, int64_t head_dim, float* to) {
  int64_t d = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::CappedTag<float, 4> d4;
  const hn::Repartition<double, decltype(d4)> d2;
  auto pairs = [&](auto lower, auto upper, bool high) {
    const auto l = hn::BitCast(d2, lower), u = hn::BitCast(d2, upper);
    return hn::BitCast(d4, high ? hn::InterleaveUpper(d2, l, u) : hn::InterleaveLower(d2, l, u));
  };
  for (; d + 4 <= head_dim; d += 4) {
    const auto r0 = hn::LoadU(d4, rows + d), r1 = hn::LoadU(d4, rows + stride + d);
    const auto r2 = hn::LoadU(d4, rows + 2 * stride + d), r3 = hn::LoadU(d4, rows + 3 * stride + d);
    const auto low01 = hn::InterleaveLower(d4, r0, r1), high01 = hn::InterleaveUpper(d4, r0, r1);
    const auto low23 = hn::InterleaveLower(d4, r2, r3), high23 = hn::InterleaveUpper(d4, r2, r3);
    hn::StoreU(pairs(low01, low23, false), d4, to + d * kPanel);
    hn::StoreU(pairs(low01, low23, true), d4, to + (d + 1) * kPanel);
    hn::StoreU(pairs(high01, high23, false), d4, to + (d + 2) * kPanel);
    hn::StoreU(pairs(high01, high23, true), d4, to + (d + 3) * kPanel);
  }
#endif
  for (; d < head_dim; ++d) {
    for (int i = 0; i < 4; ++i) to[d * kPanel + i] = rows[i * stride + d];
  }
}

void PackKeys(const Rows& rows, int32_t head_dim, int64_t key, void* k) {
  float* to = static_cast<float*>(k) + key * KeyDepth(head_dim);
  HWY_ALIGN float buffer[4 * kMaxHeadDim];
  for (int32_t i = 0; i < kGroup; i += 4) {
    for (int32_t j = 0; j < 4; ++j) LoadOrZero(rows, i + j, head_dim, head_dim, buffer + j * kMaxHeadDim);
    StoreColumns(buffer, kMaxHeadDim, head_dim, to + i / kPanel * kPanel * KeyDepth(head_dim) + i % kPanel);
  }
}

void PackValues(const Rows& rows, int32_t head_dim, int64_t key, void* v) {
  const ValuePanels panels(head_dim);
  float* group = static_cast<float*>(v) + key * ValueWidth(head_dim);
  HWY_ALIGN float buffer[kMaxHeadDim];
  for (int32_t i = 0; i < kGroup; ++i) {
    LoadOrZero(rows, i, head_dim, ValueWidth(head_dim), buffer);
    for (int64_t panel = 0; panel < panels.panels; ++panel) {
      const int64_t begin = panels.Begin(panel) * kLanes, width = panels.Begin(panel + 1) * kLanes - begin;
      float* to = group + begin * kGroup + i * width;
      for (int64_t j = 0; j < width; j += kLanes) hn::StoreU(hn::LoadU(DF(), buffer + begin + j), DF(), to + j);
    }
  }
}

// Each value is divided before it is added, so that a mean of finite values is finite.
void Mean(const Rows& rows, int32_t head_dim, float* mean) {
  const int64_t width = ValueWidth(head_dim);
  HWY_ALIGN float buffer[kMaxHeadDim];
  const VF share = hn::Set(DF(), 1.0f / static_cast<float>(rows.count));
  std::fill(mean, mean + width, 0.0f);
  for (int32_t i = 0; i < rows.count; ++i) {
    LoadOrZero(rows, i, head_dim, width, buffer);
    for (int64_t d = 0; d < width; d += kLanes) {
      hn::StoreU(hn::MulAdd(hn::LoadU(DF(), buffer + d), share, hn::LoadU(DF(), mean + d)), DF(), mean + d);
    }
  }
}

// ---------------------------------------------------------------- weights

#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
// 2^x by the two instructions made for it: vreduceps leaves x - floor(x) (0 for -inf), vscalefps multiplies by
// 2^floor(x). Relative error 8e-8 (minimax of degree 5 on [0, 1)).
HWY_INLINE VF Exp2(VF x) {
  const DF df;
  const VF f{_mm512_reduce_ps(x.raw, 0x09)};
  VF p = hn::Set(df, 0.00187757667f);
  p = hn::MulAdd(p, f, hn::Set(df, 0.00898934034f));
  p = hn::MulAdd(p, f, hn::Set(df, 0.0558263176f));
  p = hn::MulAdd(p, f, hn::Set(df, 0.240153617f));
  p = hn::MulAdd(p, f, hn::Set(df, 0.693153073f));
  p = hn::MulAdd(p, f, hn::Set(df, 0.999999925f));
  return VF{_mm512_scalef_ps(p.raw, x.raw)};
}
#else
// 2^x for x below 128; 0 below -126. Adding 1.5 * 2^23 rounds x to the integer n, which then stands in the low bits
// of the sum: shifted, it adds to the exponent of 2^(x - n). Relative error 8e-8 (minimax of degree 5 on [-1/2, 1/2]).
HWY_INLINE VF Exp2(VF x) {
  const DF df;
  const DI di;
  const VF magic = hn::Set(df, 12582912.0f);
  const VF rounded = hn::Add(x, magic);
  const VF f = hn::Sub(x, hn::Sub(rounded, magic));
  VF p = hn::Set(df, 0.0013276472f);
  p = hn::MulAdd(p, f, hn::Set(df, 0.0096755415f));
  p = hn::MulAdd(p, f, hn::Set(df, 0.0555071328f));
  p = hn::MulAdd(p, f, hn::Set(df, 0.240221197f));
  p = hn::MulAdd(p, f, hn::Set(df, 0.693146967f));
  p = hn::MulAdd(p, f, hn::Set(df, 1.0f));
  const auto bits = hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(hn::BitCast(di, rounded)));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(df, -126.0f)), hn::BitCast(df, bits));
}
#endif

// Makes the largest score of the row its reference and rescales what was summed before.
HWY_NOINLINE void Rescale(const TileState& tile, int32_t r, float largest) {
  const float before = tile.largest[r];
  tile.largest[r] = largest;
  if (before == -kInfinity) return; // nothing was summed
  const DF df;
  const VF factor = hn::Set(df, std::exp2((before - largest) * tile.scale));
  const int64_t width = ValueWidth(tile.head_dim);
  for (float* x = tile.o + r * width; x != tile.o + (r + 1) * width; x += kLanes) {
    hn::StoreU(hn::Mul(hn::LoadU(df, x), factor), df, x);
  }
  for (float* x = tile.sum + r * kLeast; x != tile.sum + (r + 1) * kLeast; x += kLanes) {
    hn::StoreU(hn::Mul(hn::LoadU(df, x), factor), df, x);
  }
}

// Weights can grow to 2^8 times what the reference stands for before it has to move. So it moves about once a tile,
// and fp32 (nor bf16: its range is the same) loses nothing by it.
constexpr float kHeadroom = 8;

// scores[begin, end) become weights. Columns that a row doesn't see become exact zeros, as far as Values reads. Where
// rows may skip, the reference is always the largest score, without headroom: what is skipped is said by that.
uint64_t Weigh(const TileState& tile, const Chunk& chunk, int32_t begin, int32_t end) {
  const DF df;
  const VF lowest = hn::Set(df, -kInfinity), scale = hn::Set(df, tile.scale);
  const bool skips = tile.skip > -kInfinity;
  const float headroom = skips ? 0 : kHeadroom / tile.scale;
  uint64_t skipped = 0;
  const int32_t filled = (SeenColumns(chunk, end) + kLanes - 1) / kLanes * kLanes;
  for (int32_t r = begin; r < end; ++r) {
    float* row = tile.scores + (r - begin) * kScoreStride;
    const int32_t seen = chunk.limit ? chunk.limit[r] : chunk.columns;
    const int32_t whole = seen / kLanes * kLanes, vectors = (seen + kLanes - 1) / kLanes * kLanes;
    if (chunk.bias) {
      const float* biases = chunk.bias + r % chunk.bias_rows * kChunk;
      for (int32_t i = 0; i < vectors; i += kLanes) {
        const VF bias = hn::LoadU(df, biases + i);
        const VF score = hn::Add(hn::LoadU(df, row + i), bias);
        hn::StoreU(hn::IfThenElse(hn::Eq(bias, lowest), lowest, score), df, row + i);
      }
    }
    if (whole < vectors) {
      const auto seen_lanes = hn::FirstN(df, static_cast<size_t>(seen - whole));
      hn::StoreU(hn::IfThenElse(seen_lanes, hn::LoadU(df, row + whole), lowest), df, row + whole);
    }
    VF largest = lowest;
    for (int32_t i = 0; i < vectors; i += kLanes) largest = hn::Max(largest, hn::LoadU(df, row + i));
    if (skips && hn::GetLane(hn::MaxOfLanes(df, largest)) < tile.largest[r] + tile.skip) {
      for (int32_t i = 0; i < filled; i += kLanes) hn::StoreU(hn::Zero(df), df, row + i);
      skipped |= uint64_t{1} << (r - begin);
      *tile.skipped += seen;
      continue;
    }
    if (!hn::AllFalse(df, hn::Gt(largest, hn::Set(df, tile.largest[r] + headroom)))) {
      Rescale(tile, r, hn::GetLane(hn::MaxOfLanes(df, largest)));
    }
    const VF reference = hn::Set(df, tile.largest[r] == -kInfinity ? 0.0f : tile.largest[r] * tile.scale);
    VF sum = hn::LoadU(df, tile.sum + r * kLeast);
    for (int32_t i = 0; i < vectors; i += kLanes) {
      const VF weight = Exp2(hn::MulSub(hn::LoadU(df, row + i), scale, reference));
      sum = hn::Add(sum, weight);
      hn::StoreU(weight, df, row + i);
    }
    hn::StoreU(sum, df, tile.sum + r * kLeast);
    for (int32_t i = vectors; i < filled; i += kLanes) hn::StoreU(hn::Zero(df), df, row + i);
  }
  return skipped;
}

// ---------------------------------------------------------------- few rows

// A chunk for few rows, and keys as they lie. Each key is read once from far away, so there is nothing to gain from
// packing it, and memory is the limit: what comes kFarAhead keys later is fetched meanwhile, as the next token's row is
// further away than the core's own prefetch sees.
void AttendUnpacked(const TileState& tile, const Chunk& chunk, const Rows& k, const Rows& v) {
  constexpr int32_t kFarAhead = 16, kAtOnce = 4;
  const DF df;
  const int64_t width = ValueWidth(tile.head_dim), q_stride = QueryStride(tile.head_dim);
  const int32_t seen = SeenColumns(chunk, tile.rows);
  HWY_ALIGN float buffer[kAtOnce * kMaxHeadDim];

  // Row i in fp32, with zeros up to `width`.
  auto load = [&](const Rows& from, int32_t i) HWY_ATTR -> const float* {
    const int64_t size = static_cast<int64_t>(DtypeSize(from.dtype));
    const char* data = static_cast<const char*>(from.data);
    if (from.step == 1 && i + kFarAhead < from.count) {
      const char* ahead = data + from.offset[i + kFarAhead] * size;
      for (int64_t line = 0; line < tile.head_dim * size; line += 64) __builtin_prefetch(ahead + line);
    }
    if (from.dtype == FP_F32 && from.step == 1 && width == tile.head_dim) {
      return reinterpret_cast<const float*>(data) + from.offset[i];
    }
    float* to = buffer + i % kAtOnce * kMaxHeadDim;
    LoadRow(from.data, from.dtype, from.offset[i], from.step, tile.head_dim, width, to, from.scale);
    return to;
  };
  auto dot = [&](const float* q, const float* key) HWY_ATTR {
    VF sum = hn::Zero(df);
    for (int64_t d = 0; d < width; d += kLanes) sum = hn::MulAdd(hn::LoadU(df, q + d), hn::LoadU(df, key + d), sum);
    return hn::GetLane(hn::SumOfLanes(df, sum));
  };
  auto add = [&](float* o, float weight, const float* value) HWY_ATTR {
    const VF w = hn::Set(df, weight);
    for (int64_t d = 0; d < width; d += kLanes) {
      hn::StoreU(hn::MulAdd(w, hn::LoadU(df, value + d), hn::LoadU(df, o + d)), df, o + d);
    }
  };
  auto add_four = [&](float* o, const float* weight, const float* const* value) HWY_ATTR {
    const VF w0 = hn::Set(df, weight[0]), w1 = hn::Set(df, weight[1]);
    const VF w2 = hn::Set(df, weight[2]), w3 = hn::Set(df, weight[3]);
    for (int64_t d = 0; d < width; d += kLanes) {
      VF sum = hn::MulAdd(w0, hn::LoadU(df, value[0] + d), hn::LoadU(df, o + d));
      sum = hn::MulAdd(w1, hn::LoadU(df, value[1] + d), sum);
      sum = hn::MulAdd(w2, hn::LoadU(df, value[2] + d), sum);
      hn::StoreU(hn::MulAdd(w3, hn::LoadU(df, value[3] + d), sum), df, o + d);
    }
  };

  for (int32_t i = 0; i < seen; ++i) {
    const float* key = load(k, i);
    for (int32_t r = 0; r < tile.rows; ++r) {
      tile.scores[r * kScoreStride + i] = dot(static_cast<const float*>(tile.q) + r * q_stride, key);
    }
  }
  Weigh(tile, chunk, 0, tile.rows);
  for (int32_t i = 0; i < seen; i += kAtOnce) {
    const int32_t count = std::min(seen - i, kAtOnce);
    const float* value[kAtOnce];
    for (int32_t j = 0; j < count; ++j) value[j] = load(v, i + j);
    for (int32_t r = 0; r < tile.rows; ++r) {
      const float* weight = tile.scores + r * kScoreStride + i;
      const int32_t counts =
          chunk.limit ? std::min(chunk.limit[r] - i, count) : count; // the row's own future may be NaN
      if (counts == kAtOnce) {
        add_four(tile.o + r * width, weight, value);
      } else {
        for (int32_t j = 0; j < counts; ++j) add(tile.o + r * width, weight[j], value[j]);
      }
    }
  }
}

void Finish(const TileState& tile, const Rows& out, bool stream, float* lse) {
  const int64_t width = ValueWidth(tile.head_dim);
  for (int32_t r = 0; r < tile.rows; ++r) {
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += tile.sum[r * kLeast + i];
    const float factor = sum == 0 ? 0.0f : 1 / sum; // a row of nothing is zeros
    StoreRow(tile.o + r * width, factor, tile.head_dim, const_cast<void*>(out.data), out.dtype, out.offset[r], out.step,
             stream);
    lse[r] = sum == 0 ? -kInfinity : (tile.largest[r] * tile.scale + std::log2(sum)) * 0.693147181f;
  }
  if (stream) hwy::FlushStream();
}

} // namespace

constexpr AttendKernels kAttendKernels = {sizeof(float), LoadQueries, PackKeys,       PackValues,
                                          Mean,          AttendChunk, AttendUnpacked, Finish};

} // namespace flashprefill::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "cpu/attend/tile.h"

namespace flashprefill::cpu {

extern const AttendKernels kAttendBf16Kernels, kAttendAmxKernels;

const AttendKernels& AttendF32KernelsFor(Isa isa) { return *FLASHPREFILL_KERNELS_FOR(isa, kAttendKernels); }

const AttendKernels& AttendKernelsFor(Isa isa, const Problem& p) {
  [[maybe_unused]] const bool all_bf16 = p.q.dtype == FP_BF16 && p.k.dtype == FP_BF16 && p.v.dtype == FP_BF16;
#ifdef FLASHPREFILL_AVX512_BF16
  if (isa == Isa::kAvx512Bf16 && all_bf16) return kAttendBf16Kernels;
#endif
#ifdef FLASHPREFILL_AMX_BF16
  if (isa == Isa::kAmxBf16 && all_bf16) return kAttendAmxKernels;
#endif
  return AttendF32KernelsFor(isa);
}

} // namespace flashprefill::cpu
#endif // HWY_ONCE
