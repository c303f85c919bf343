// Attend with bf16 products in tiles, for AMX: tdpbf16ps adds the product of 16 rows of 32 elements and 32 rows of 16
// to 16 x 16 sums, 16384 operations in 16 cycles, sixteen times the rate of fp32 multiply-adds (Sapphire Rapids and
// later). It serves calls whose q, k and v are all bf16.
//
// Operands lie as they do for vdpbf16ps (bf16.cc): tiles want A as rows of bf16, which Q and the weights are,
// and B as pairs of rows, which packed K and V are. So only the micro-kernel is new, C[32][32] in four tiles from two
// of A and two of B: four loads for four products, and loads take half as long. What is no whole tile, rows above a
// tile's last, is computed and not used; a depth that is no whole step is copied and filled up with zeros.
//
// load_queries takes the tile registers for the thread and finish gives them back, so that between attend's tiles no
// switch of threads has to save their 8 KiB.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu/attend/kernels.h"

namespace flashprefill::cpu {

extern const AttendKernels kAttendAmxKernels;

namespace {

constexpr int kLanes = 16;
constexpr int kTile = 16; // rows of a tile, and pairs in a row of one of A
constexpr int kRows = 2 * kTile;
constexpr int kVectors = 2;
constexpr int kPanel = kVectors * kLanes;
constexpr int kStrip = 64;
static_assert(kStrip <= kMaxStrip && kStrip % kRows == 0 && kGroup % kPanel == 0, "see kernels.h");

// ---------------------------------------------------------------- the micro-kernel

using Pair = uint32_t; // two bf16

// `ahead` is fetched meanwhile, a line for every kAheadStep rows of B, as in kernels.cc.
constexpr int kAheadStep = 2;
constexpr int kLine = 16; // pairs

// All eight tiles have 16 rows of 64 bytes: 0 to 3 are C, 4 and 5 A, 6 and 7 B.
struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
alignas(64) constexpr TileConfig kTileConfig = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// The compiler does not know that loads of tiles read memory.
inline __attribute__((always_inline)) void StoresBeforeTiles() { __asm__ volatile("" ::: "memory"); }

// C += A B over 16 pairs of depth.
template <int TILES, int VECTORS>
inline __attribute__((always_inline)) void Step(const Pair* a, int64_t a_stride, const Pair* b, int64_t b_stride) {
  constexpr int64_t kSize = sizeof(Pair);
  _tile_loadd(6, b, b_stride * kSize);
  _tile_loadd(4, a, a_stride * kSize);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (VECTORS == 2) {
    _tile_loadd(7, b + kLanes, b_stride * kSize);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (TILES == 2) {
    _tile_loadd(5, a + kTile * a_stride, a_stride * kSize);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (VECTORS == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

// The same over fewer pairs: the elements after them, in A the weights of other keys, count as zeros.
template <int TILES, int VECTORS>
__attribute__((noinline)) void LastStep(const Pair* a, int64_t a_stride, const Pair* b, int64_t b_stride,
                                        int64_t pairs) {
  alignas(64) Pair a_copy[TILES * kTile][kTile], b_copy[kTile][VECTORS * kLanes];
  const __mmask16 counts = static_cast<__mmask16>((1u << pairs) - 1);
  for (int r = 0; r < TILES * kTile; ++r) {
    _mm512_store_si512(a_copy[r], _mm512_maskz_loadu_epi32(counts, a + r * a_stride));
  }
  for (int64_t k = 0; k < kTile; ++k) {
    for (int j = 0; j < VECTORS; ++j) {
      _mm512_store_si512(b_copy[k] + j * kLanes,
                         k < pairs ? _mm512_loadu_si512(b + k * b_stride + j * kLanes) : _mm512_setzero_si512());
    }
  }
  StoresBeforeTiles();
  Step<TILES, VECTORS>(a_copy[0], kTile, b_copy[0], VECTORS * kLanes);
}

template <int TILES, int VECTORS, bool ADD>
void Micro(const Pair* a, int64_t a_stride, const Pair* b, int64_t b_stride, int64_t depth, float* c, int64_t c_stride,
           const Pair* ahead) {
  const int64_t c_bytes = c_stride * static_cast<int64_t>(sizeof(float));
  float* c_low = c + kTile * c_stride;
  StoresBeforeTiles();
  if constexpr (ADD) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (VECTORS == 2) _tile_loadd(1, c + kLanes, c_bytes);
    if constexpr (TILES == 2) _tile_loadd(2, c_low, c_bytes);
    if constexpr (TILES == 2 && VECTORS == 2) _tile_loadd(3, c_low + kLanes, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (VECTORS == 2) _tile_zero(1);
    if constexpr (TILES == 2) _tile_zero(2);
    if constexpr (TILES == 2 && VECTORS == 2) _tile_zero(3);
  }
  int64_t k = 0;
  for (; k + kTile <= depth; k += kTile) {
#pragma GCC unroll 8
    for (int i = 0; i < kTile / kAheadStep; ++i, ahead += kLine) __builtin_prefetch(ahead, 0, 2); // into L2
    Step<TILES, VECTORS>(a + k, a_stride, b + k * b_stride, b_stride);
  }
  if (k < depth) LastStep<TILES, VECTORS>(a + k, a_stride, b + k * b_stride, b_stride, depth - k);
  _tile_stored(0, c, c_bytes);
  if constexpr (VECTORS == 2) _tile_stored(1, c + kLanes, c_bytes);
  if constexpr (TILES == 2) _tile_stored(2, c_low, c_bytes);
  if constexpr (TILES == 2 && VECTORS == 2) _tile_stored(3, c_low + kLanes, c_bytes);
}

// of[rows - 1][vectors - 1]
template <bool ADD>
struct MicroTable {
  decltype(&Micro<1, 1, false>) of[kRows][kVectors];
  constexpr MicroTable() : of() {
    for (int r = 0; r < kRows; ++r) {
      of[r][0] = r < kTile ? Micro<1, 1, ADD> : Micro<2, 1, ADD>;
      of[r][1] = r < kTile ? Micro<1, 2, ADD> : Micro<2, 2, ADD>;
    }
  }
};
constexpr MicroTable<false> kMultiply;
constexpr MicroTable<true> kMultiplyAdd;

// ---------------------------------------------------------------- everything else

#include "cpu/attend/bf16.inc"

void BeginTile(const Rows& rows, int32_t head_dim, void* q) {
  _tile_loadconfig(&kTileConfig);
  LoadQueries(rows, head_dim, q);
}

void EndTile(const TileState& tile, const Rows& out, bool stream, float* lse) {
  _tile_release();
  Finish(tile, out, stream, lse);
}

} // namespace

const AttendKernels kAttendAmxKernels = {sizeof(uint16_t), BeginTile, PackKeys, PackValues, Mean,
                                         AttendChunk,      nullptr,   EndTile};

} // namespace flashprefill::cpu
