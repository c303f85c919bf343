// What the math sides of the attend kernels share, bf16's (attend.cuh) and 8 bits' (../attend_8bit/attend.cuh): masks
// of scores, whatever type they are held in, and the way of a finished tile's rows to memory. A warp has 16 rows of the
// tile; its lanes hold scores and output as row_math.cuh says.
#ifndef FLASHPREFILL_CUDA_SM90_ATTEND_MATH_SIDE_CUH_
#define FLASHPREFILL_CUDA_SM90_ATTEND_MATH_SIDE_CUH_

#include "cuda/common/attend/row_math.cuh"
#include "cuda/sm90/attend/shared_memory.cuh"

namespace flashprefill::cuda {

constexpr int kMathWarp0 = (kAttendThreads - kMathThreads) / 32;

// row / heads_per_tile, exact for the 128 rows of a tile.
__device__ __forceinline__ int TokenOf(const AttendArgs& p, int row) { return row * p.token_of_row >> 16; }

// A bit for each of this lane's two rows, of `rows` that exist. Computed where it is needed, which is seldom.
__device__ __forceinline__ int RowsExist(int rows) {
  const int thread = ThreadAgain(), row = (thread / 32 - kMathWarp0) * 16 + thread % 32 / 4;
  return (row < rows ? 1 : 0) | (row + 8 < rows ? 2 : 0);
}

// ---------------------------------------------------------------- masks

// A score that counts for nothing: a float, or the bits of one.
template <class SCORE>
__device__ __forceinline__ SCORE Masked() {
  if constexpr (std::is_same_v<SCORE, float>) {
    return -INFINITY;
  } else {
    return static_cast<SCORE>(0xff800000u);
  }
}

// Scores of keys behind the last one that a row sees. Sums and comparisons are written as the compiler turns them best:
// one addition per two columns.
template <int KEYS, class SCORE>
__device__ __forceinline__ void MaskKeys(SCORE* s, const KeyTile& key_tile, const int (&last_key)[2], int lane) {
#pragma unroll
  for (int i = 0; i < KEYS / 16; ++i) {
    const int first = key_tile.position[i] + lane % 4 * 2;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int position = first + e / 4 * 8, last = last_key[e / 2 % 2];
      const bool behind = e % 2 ? position >= last : position > last;
      if (behind) s[8 * i + e] = Masked<SCORE>();
    }
  }
}

// body(scores, column) for this lane's columns i of a step whose bit i in `columns` (KeyTile::wanted) is `set`:
// scores[0] and scores[2] are those of its two rows.
template <int KEYS, class SCORE, class Body>
__device__ __forceinline__ void ForColumns(SCORE* s, uint32_t columns, bool set, Body&& body) {
#pragma unroll
  for (int i = 0; i < KEYS / 4; ++i) { // of columns 8 (i / 2) + i % 2 from this lane's first on, both rows
    if ((columns >> i & 1) == (set ? 1 : 0)) body(s + i / 2 * 4 + i % 2);
  }
}

// Scores of columns that are not wanted: means that are not corrected for, keys that are not listed.
template <int KEYS, class SCORE>
__device__ __forceinline__ void MaskUnwanted(SCORE* s, const KeyTile& key_tile, int lane) {
  ForColumns<KEYS>(s, key_tile.wanted[lane % 4], false,
                   [](SCORE* of_rows) { of_rows[0] = of_rows[2] = Masked<SCORE>(); });
}

// ---------------------------------------------------------------- out

// A warp's 16 rows, columns from `first_column` on, whole rows at a time, 16 bytes per lane.
template <class T, class SHAPE, class At>
__device__ __forceinline__ void StoreRows(const AttendParams& p, const TileInfo& tile, At at, int lane, int first_row,
                                          int first_column) {
  constexpr int kPieces = SHAPE::kOutColumns / 8;
  T* const out = static_cast<T*>(p.out) + tile.batch * p.out_stride[0] + tile.head * p.out_stride[2];
#pragma unroll 1
  for (int i = lane; i < 16 * kPieces; i += 32) {
    const int row = i / kPieces, piece = i % kPieces;
    const int tile_row = first_row + row;
    const int column = first_column + piece * 8;
    if (tile_row < tile.rows && column < p.head_dim) {
      const int token = TokenOf(p, tile_row);
      T* const to = out + (tile.token + token) * p.out_stride[1] +
                    (tile_row - token * p.heads_per_tile) * p.out_stride[2] + column;
      *reinterpret_cast<uint4*>(to) = LoadShared16(at(row, piece));
    }
  }
}

// O, packed, leaves by bulk copies, 16 rows per warp. A tile that is not full would write over what follows it, so its
// rows go one by one, as do those of groups that 16 rows don't hold whole. lse_of(r) is the LSE of this lane's row r.
template <class T, class SHAPE, class Memory, class LseOf>
__device__ __forceinline__ void StoreTile(const AttendParams& p, Memory& sm, const TileInfo& tile,
                                          const uint32_t (&out)[SHAPE::kHeadDim / 4], LseOf&& lse_of) {
  constexpr int kColumns = SHAPE::kOutColumns;
  constexpr int kPanelBytes = 16 * Memory::kPanelRowsBytes;
  const int thread = ThreadAgain(), lane = thread % 32, warp = thread / 32 - kMathWarp0;
  const uint32_t stage = SharedAddress(sm.out[warp]);
  const int first_row = warp * 16;
  const bool bulk = tile.rows == kTileRowsSm90 && p.bulk_out;
  const auto at = [&](int row, int piece) { // 16 bytes of a row, in panels as everywhere
    return stage + piece / 8 * kPanelBytes + row * Memory::kPanelRowsBytes + ((piece % 8 ^ row % 8) << 4);
  };
#pragma unroll
  for (int pass = 0; pass < SHAPE::kHeadDim / kColumns; ++pass) {
    if (ElectOne()) BulkStoresRead(); // of the tile or pass before
    __syncwarp();
    const int matrix_row = lane % 8 + lane / 8 % 2 * 8;
#pragma unroll
    for (int c = 0; c < kColumns / 8; c += 2) { // 16 columns at once: four 8x8 matrices
      const uint32_t* o = out + (pass * kColumns / 8 + c) * 2;
      StoreMatrix4(at(matrix_row, c + lane / 16), o[0], o[1], o[2], o[3]);
    }
    if (bulk) {
      FenceAsyncProxy();
      __syncwarp();
      if (ElectOne()) {
#pragma unroll
        for (int i = 0; i < kColumns / kPanelColumns; ++i) {
          BulkStore(&p.out_map, stage + i * kPanelBytes, pass * kColumns + i * kPanelColumns, tile.head,
                    tile.token + TokenOf(p, first_row), tile.batch);
        }
        BulkStoresCommit();
      }
    } else {
      __syncwarp();
      StoreRows<T, SHAPE>(p, tile, at, lane, first_row, pass * kColumns);
    }
  }
  // Of four lanes that share two rows the first two write a row each.
  const int r = lane % 4, tile_row = first_row + lane / 4 + 8 * r;
  if (p.lse != nullptr && r < 2 && tile_row < tile.rows) {
    const int token = TokenOf(p, tile_row);
    const int head = tile.head + tile_row - token * p.heads_per_tile;
    p.lse[tile.batch * p.lse_stride[0] + head * p.lse_stride[1] + (tile.token + token) * p.lse_stride[2]] = lse_of(r);
  }
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_SM90_ATTEND_MATH_SIDE_CUH_
