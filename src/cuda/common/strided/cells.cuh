// Geometry that the three strided kernels share: the units of a sequence in a chunk, and the cells that a row sees.
#ifndef FLASHPREFILL_CUDA_COMMON_STRIDED_CELLS_CUH_
#define FLASHPREFILL_CUDA_COMMON_STRIDED_CELLS_CUH_

#include "cuda/common/strided/args.h"

namespace flashprefill::cuda {

// The tiles of a sequence that lie in a chunk.
struct StridedRange {
  int first_tile; // of the sequence
  int local_tile; // where that one lies in the chunk
  int units;
};

__device__ inline StridedRange RangeOf(const StridedArgs& a, const DeviceSequence& s) {
  const int base = s.TileBase(a.rules);
  const int begin = max(base, a.first_tile);
  const int end = min(base + s.Tiles(a.rules), a.first_tile + a.tiles);
  return {begin - base, begin - a.first_tile, max(0, end - begin) * a.rules.units_per_kv};
}

// Cells that the sequence's query `last` sees: those whose first key it may attend to.
__device__ inline int CellsSeen(const StridedArgs& a, const DeviceSequence& s, int last) {
  const int last_key = a.d.p.causal ? s.prefix + last : s.k_len - 1;
  return (last_key >> a.shape.log2_stride) + 1;
}

// Key tiles that the last row of a tile sees: no row of it sees more.
__device__ inline int KeyTilesSeen(const StridedArgs& a, const DeviceSequence& s, const DeviceTile& tile) {
  return (CellsSeen(a, s, tile.end - 1) + a.shape.key_tile_cells - 1) / a.shape.key_tile_cells;
}

// Query that stands for row i of a tile, and as far as which a cell of queries reaches; -1: no such row.
__device__ inline int LastQuery(const StridedShape& g, const DeviceTile& tile, int i, int head) {
  const int begin = tile.begin + (i << g.log2_stride);
  const int place = g.means ? g.stride - 1 - (head & (g.stride - 1)) : g.stride - 1;
  return begin < tile.end ? min(begin + place, tile.end - 1) : -1;
}

// Key cells [0, limit) that row i of a tile sees.
__device__ inline int RowLimit(const StridedArgs& a, const DeviceSequence& s, const DeviceTile& tile, int i, int head) {
  const int last = LastQuery(a.shape, tile, i, head);
  return last < 0 ? 0 : CellsSeen(a, s, last);
}

} // namespace flashprefill::cuda

#endif // FLASHPREFILL_CUDA_COMMON_STRIDED_CELLS_CUH_
