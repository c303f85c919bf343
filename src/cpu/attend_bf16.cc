// Attend with bf16 products, for AVX512_BF16: vdpbf16ps multiplies pairs, c += a0 b0 + a1 b1, in 16 lanes, which on
// AMD's cores (Zen 4 and later) is twice the work of an fp32 multiply-add in the same time. It serves calls whose q, k
// and v are all bf16; Q and K enter the products exactly as they are, P is rounded to bf16.
//
// The schedule is that of attend_kernels.cc, the layouts are its layouts with pairs in the place of elements: pairs of
// d in Q and K, pairs of keys in P and V. Highway 1.0.3 has no such operation, so these are intrinsics, in a file that
// is compiled with -mavx512bf16 and called behind CPUID. It includes no C++ header on purpose: an inline function
// emitted here could be the one that the linker keeps for machines that cannot run it.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu/attend_kernels.h"

namespace flashprefill::cpu {

extern const AttendKernels kAttendBf16Kernels;

namespace {

constexpr int kLanes = 16;
constexpr int kRows = 8; // 8 x 32: 16 of 32 registers
constexpr int kVectors = 2;
constexpr int kPanel = kVectors * kLanes;
constexpr int kStrip = 48;
static_assert(kStrip <= kMaxStrip && kGroup % kPanel == 0, "see attend_kernels.h");

// ---------------------------------------------------------------- the micro-kernel

using Pair = uint32_t; // two bf16

// `ahead` is fetched meanwhile, a line for every kAheadStep rows of B, as in attend_kernels.cc.
constexpr int kAheadStep = 8;
constexpr int kLine = 16; // pairs

template <int ROWS, int VECTORS, bool ADD>
void Micro(const Pair* __restrict__ a, int64_t a_stride, const Pair* __restrict__ b, int64_t b_stride, int64_t depth,
           float* __restrict__ c, int64_t c_stride, const Pair* ahead) {
  __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) sum[r][j] = _mm512_setzero_ps();
  }
  auto step = [&](int64_t k) {
    __m512bh row[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) row[j] = (__m512bh)_mm512_loadu_si512(b + k * b_stride + j * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * a_stride + k]));
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], x, row[j]);
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
      _mm512_storeu_ps(to, ADD ? _mm512_add_ps(sum[r][j], _mm512_loadu_ps(to)) : sum[r][j]);
    }
  }
}

// of[rows - 1][vectors - 1]
template <bool ADD>
struct MicroTable {
  decltype(&Micro<1, 1, false>) of[kRows][kVectors] = {
      {Micro<1, 1, ADD>, Micro<1, 2, ADD>}, {Micro<2, 1, ADD>, Micro<2, 2, ADD>}, {Micro<3, 1, ADD>, Micro<3, 2, ADD>},
      {Micro<4, 1, ADD>, Micro<4, 2, ADD>}, {Micro<5, 1, ADD>, Micro<5, 2, ADD>}, {Micro<6, 1, ADD>, Micro<6, 2, ADD>},
      {Micro<7, 1, ADD>, Micro<7, 2, ADD>}, {Micro<8, 1, ADD>, Micro<8, 2, ADD>}};
};
constexpr MicroTable<false> kMultiply;
constexpr MicroTable<true> kMultiplyAdd;

// ---------------------------------------------------------------- the phases of a chunk

using Element = Pair;
constexpr int kPerElement = 2;
#include "cpu/attend_phases.inc"

// ---------------------------------------------------------------- packing

// to[0, count) = row i, to[count, padded) = 0; all zeros if there is no such row.
void LoadRow(const Rows& rows, int32_t i, int64_t count, int64_t padded, uint16_t* to) {
  int64_t d = 0;
  if (i < rows.count) {
    const uint16_t* from = static_cast<const uint16_t*>(rows.data) + rows.offset[i];
    if (rows.step == 1) {
      memcpy(to, from, static_cast<size_t>(count) * sizeof(uint16_t));
      d = count;
    } else {
      for (; d < count; ++d) to[d] = from[d * rows.step];
    }
  }
  for (; d < padded; ++d) to[d] = 0;
}

void LoadQueries(const Rows& rows, int32_t head_dim, void* q) {
  const int64_t stride = QueryStride(head_dim);
  for (int32_t i = 0; i < rows.count; ++i) {
    LoadRow(rows, i, head_dim, KeyDepth(head_dim), static_cast<uint16_t*>(q) + i * stride);
  }
}

// Four keys at a time become columns of a panel: their pairs are transposed 4 x 4.
void PackKeys(const Rows& rows, int32_t head_dim, int64_t key, void* k) {
  constexpr int64_t kStride = kMaxHeadDim + 8; // the last 4 x 4 may reach past the row
  const int64_t pairs = KeyDepth(head_dim) / 2;
  Pair* group = static_cast<Pair*>(k) + key * pairs;
  alignas(64) uint16_t buffer[4][kStride];
  for (int32_t i = 0; i < kGroup; i += 4) {
    for (int32_t j = 0; j < 4; ++j) LoadRow(rows, i + j, head_dim, (head_dim + 7) / 8 * 8, buffer[j]);
    Pair* to = group + i / kPanel * kPanel * pairs + i % kPanel;
    for (int64_t d = 0; d < pairs; d += 4) {
      __m128i x[4], low[2], high[2];
      for (int j = 0; j < 4; ++j) x[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(buffer[j] + 2 * d));
      for (int j = 0; j < 2; ++j) {
        low[j] = _mm_unpacklo_epi32(x[2 * j], x[2 * j + 1]);
        high[j] = _mm_unpackhi_epi32(x[2 * j], x[2 * j + 1]);
      }
      const __m128i columns[4] = {_mm_unpacklo_epi64(low[0], low[1]), _mm_unpackhi_epi64(low[0], low[1]),
                                  _mm_unpacklo_epi64(high[0], high[1]), _mm_unpackhi_epi64(high[0], high[1])};
      for (int64_t j = 0; j < Least(4, pairs - d); ++j) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (d + j) * kPanel), columns[j]);
      }
    }
  }
}

void PackValues(const Rows& rows, int32_t head_dim, int64_t key, void* v) {
  const ValuePanels panels(head_dim);
  const int64_t width = ValueWidth(head_dim);
  Pair* group = static_cast<Pair*>(v) + key / 2 * width;
  alignas(64) uint16_t even[kMaxHeadDim], odd[kMaxHeadDim];
  for (int32_t i = 0; i < kGroup; i += 2) {
    LoadRow(rows, i, head_dim, width, even);
    LoadRow(rows, i + 1, head_dim, width, odd);
    for (int64_t panel = 0; panel < panels.panels; ++panel) {
      const int64_t begin = panels.Begin(panel), vectors = panels.Begin(panel + 1) - begin;
      Pair* to = group + begin * kLanes * (kGroup / 2) + i / 2 * vectors * kLanes;
      for (int64_t j = 0; j < vectors; ++j) {
        const int64_t column = (begin + j) * kLanes;
        const __m512i e = _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(even + column)));
        const __m512i o = _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(odd + column)));
        _mm512_storeu_si512(to + j * kLanes, _mm512_or_si512(e, _mm512_slli_epi32(o, 16)));
      }
    }
  }
}

// Each value is divided before it is added, so that a mean of finite values is finite.
void Mean(const Rows& rows, int32_t head_dim, float* mean) {
  const int64_t width = ValueWidth(head_dim);
  const __m512 share = _mm512_set1_ps(1.0f / static_cast<float>(rows.count));
  alignas(64) uint16_t buffer[kMaxHeadDim];
  memset(mean, 0, static_cast<size_t>(width) * sizeof(float));
  for (int32_t i = 0; i < rows.count; ++i) {
    LoadRow(rows, i, head_dim, width, buffer);
    for (int64_t d = 0; d < width; d += kLanes) {
      const __m512i x = _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(buffer + d)));
      const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
      _mm512_storeu_ps(mean + d, _mm512_fmadd_ps(value, share, _mm512_loadu_ps(mean + d)));
    }
  }
}

// ---------------------------------------------------------------- weights

// 2^x by the two instructions made for it: vreduceps leaves x - floor(x) (0 for -inf), vscalefps multiplies by
// 2^floor(x). Relative error 8e-5 (minimax of degree 3 on [0, 1)), a fiftieth of what rounding to bf16 adds.
__m512 Exp2(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 0x09);
  __m512 p = _mm512_set1_ps(0.0780245222f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.226067171f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.695833527f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.999925221f));
  return _mm512_scalef_ps(p, x);
}

// Makes the largest score of the row its reference and rescales what was summed before.
__attribute__((noinline)) void Rescale(const TileState& tile, int32_t r, float largest) {
  const float before = tile.largest[r];
  tile.largest[r] = largest;
  if (before == -__builtin_inff()) return; // nothing was summed
  const __m512 factor = _mm512_set1_ps(exp2f((before - largest) * tile.scale));
  const int64_t width = ValueWidth(tile.head_dim);
  for (float* x = tile.o + r * width; x != tile.o + (r + 1) * width; x += kLanes) {
    _mm512_storeu_ps(x, _mm512_mul_ps(_mm512_loadu_ps(x), factor));
  }
  float* sum = tile.sum + r * kLeast;
  _mm512_storeu_ps(sum, _mm512_mul_ps(_mm512_loadu_ps(sum), factor));
}

constexpr float kHeadroom = 8; // as in attend_kernels.cc

// scores[begin, end) become weights in bf16, in their rows' first halves. Columns that a row doesn't see become exact
// zeros, as far as AddValues reads. What is summed are the weights before they are rounded: the roundings' errors,
// half of them up and half down, then don't enter the denominator.
void Weigh(const TileState& tile, const Chunk& chunk, int32_t begin, int32_t end) {
  constexpr int32_t kStep = 2 * kLanes; // two vectors of scores make one of weights
  const __m512 lowest = _mm512_set1_ps(-__builtin_inff()), scale = _mm512_set1_ps(tile.scale);
  const float headroom = kHeadroom / tile.scale;
  const int32_t filled = (SeenColumns(chunk, end) + kStep - 1) / kStep * kStep;
  for (int32_t r = begin; r < end; ++r) {
    float* row = tile.scores + (r - begin) * kScoreStride;
    uint16_t* weights = reinterpret_cast<uint16_t*>(row);
    const int32_t seen = chunk.limit ? chunk.limit[r] : chunk.columns;
    const int32_t vectors = (seen + kStep - 1) / kStep * kStep;
    if (chunk.bias) {
      for (int32_t i = 0; i < vectors; i += kLanes) {
        const __m512 bias = _mm512_loadu_ps(chunk.bias + i);
        const __mmask16 counts = _mm512_cmp_ps_mask(bias, lowest, _CMP_NEQ_UQ);
        _mm512_storeu_ps(row + i, _mm512_mask_add_ps(lowest, counts, _mm512_loadu_ps(row + i), bias));
      }
    }
    for (int32_t i = seen / kLanes * kLanes; i < vectors; i += kLanes) {
      const int32_t left = seen - i;
      const __mmask16 counts = left <= 0 ? __mmask16{0} : static_cast<__mmask16>((1u << left) - 1);
      _mm512_storeu_ps(row + i, _mm512_mask_loadu_ps(lowest, counts, row + i));
    }
    __m512 largest = lowest;
    for (int32_t i = 0; i < vectors; i += kLanes) largest = _mm512_max_ps(largest, _mm512_loadu_ps(row + i));
    if (_mm512_cmp_ps_mask(largest, _mm512_set1_ps(tile.largest[r] + headroom), _CMP_GT_OQ)) {
      Rescale(tile, r, _mm512_reduce_max_ps(largest));
    }
    const float reference = tile.largest[r];
    const __m512 zero_point = _mm512_set1_ps(reference == -__builtin_inff() ? 0.0f : reference * tile.scale);
    __m512 sum = _mm512_loadu_ps(tile.sum + r * kLeast);
    for (int32_t i = 0; i < vectors; i += kStep) {
      const __m512 a = Exp2(_mm512_fmsub_ps(_mm512_loadu_ps(row + i), scale, zero_point));
      const __m512 b = Exp2(_mm512_fmsub_ps(_mm512_loadu_ps(row + i + kLanes), scale, zero_point));
      sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
      _mm512_storeu_si512(weights + i, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
    _mm512_storeu_ps(tile.sum + r * kLeast, sum);
    for (int32_t i = vectors; i < filled; i += kStep) _mm512_storeu_si512(weights + i, _mm512_setzero_si512());
  }
}

void Finish(const TileState& tile, const Rows& out, float* lse) {
  const int64_t width = ValueWidth(tile.head_dim);
  for (int32_t r = 0; r < tile.rows; ++r) {
    const float sum = _mm512_reduce_add_ps(_mm512_loadu_ps(tile.sum + r * kLeast));
    const __m512 factor = _mm512_set1_ps(sum == 0 ? 0.0f : 1 / sum); // a row of nothing is zeros
    uint16_t* to = static_cast<uint16_t*>(const_cast<void*>(out.data)) + out.offset[r];
    for (int64_t d = 0; d < tile.head_dim; d += kLanes) {
      const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(tile.o + r * width + d), factor);
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(x);
      const int64_t count = Least(kLanes, tile.head_dim - d);
      if (out.step == 1 && count == kLanes) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d), rounded);
      } else {
        alignas(32) uint16_t lanes[kLanes];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), rounded);
        for (int64_t j = 0; j < count; ++j) to[(d + j) * out.step] = lanes[j];
      }
    }
    lse[r] = sum == 0 ? -__builtin_inff() : (tile.largest[r] * tile.scale + log2f(sum)) * 0.693147181f;
  }
}

} // namespace

const AttendKernels kAttendBf16Kernels = {sizeof(uint16_t), LoadQueries, PackKeys, PackValues, Mean,
                                          AttendChunk,      nullptr,     Finish};

} // namespace flashprefill::cpu
