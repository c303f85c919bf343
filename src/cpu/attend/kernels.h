// The arithmetic of attend, one table of functions for each instruction set, and the memory layouts that they share
// with the driver (attend.cc). Plain structs only: files compiled with flags of their own include this, and an inline
// function emitted there could end up on machines that cannot run it.
//
// An *element* is what products multiply: fp32, or bf16 in the tables made for it. Keys are packed in groups of 128,
// each one piece of memory for K and one for V, so that the next group can be fetched ahead by its address alone:
//     K  [group][panels of keys][head_dim][PANEL]      scores = Q . K:  a row holds one element of PANEL keys
//     V  [group][panels of columns][128 keys][width]   out += P . V:    a row holds `width` elements of one value
// bf16 interleaves pairs of rows: [head_dim / 2][PANEL][2] and [64 pairs of keys][width][2].
#ifndef FLASHPREFILL_CPU_ATTEND_KERNELS_H_
#define FLASHPREFILL_CPU_ATTEND_KERNELS_H_

#include <stdint.h>

namespace flashprefill::cpu {

constexpr int kChunk = 128;       // columns of scores that a tile works on at a time
constexpr int kGroup = 128;       // keys per packed group; every PANEL divides it
constexpr int kLeast = 16;        // blocks begin at multiples of it
constexpr int kMaxStrip = 64;     // rows whose scores exist at a time; bits of a word
constexpr int kMaxHeadDim = 512;  // of the C ABI
constexpr int kFewRows = 8;       // of a KV head whose keys are not packed
constexpr int kScoreStride = 144; // fp32 elements a row of scores: 128 would map rows to few cache sets

// head_dim as elements of a row of Q (whole pairs and vectors of any kind), of K (whole pairs) and of V and O.
static constexpr int64_t QueryStride(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }
static constexpr int64_t KeyDepth(int64_t head_dim) { return (head_dim + 1) / 2 * 2; }
static constexpr int64_t ValueWidth(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }
static constexpr int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of a tensor: element d of row i is data[offset[i] + d * step] * scale. scale is 1 but for FP8.
struct Rows {
  const void* data;
  int32_t dtype;
  int32_t count;
  int64_t step;
  const int64_t* offset;
  float scale = 1;
};

// Packed keys [key, key + count) are columns [column, column + count) of a chunk. key and column are multiples of
// kLeast.
struct KeyRun {
  int64_t key;
  int32_t column;
  int32_t count;
};

// Up to kChunk keys, in order.
struct Chunk {
  const void* k;
  const void* v;
  int32_t columns;
  int32_t runs;
  KeyRun run[kChunk / kLeast];
  const int32_t* limit; // row r sees columns [0, limit[r]), which does not fall with r; null: every row sees all
  int64_t next;         // a key of the chunk that comes next, to be fetched ahead; or -1
  const float* bias;    // [bias_rows][kChunk]: row r adds row r % bias_rows of it to its scores, a column each; -inf
                        // masks the column. Null: nothing is added
  int32_t bias_rows = 1;
};

// A tile between chunks.
struct TileState {
  int32_t rows;
  int32_t head_dim;
  float scale;    // of scores, log2(e) included: weights are exp2(scale * score - scale * largest)
  void* q;        // elements [rows][QueryStride]
  float* o;       // [rows][ValueWidth]: sum of weights times values
  float* sum;     // [rows][16]: sum of weights, by lanes
  float* largest; // [rows]: the reference of the weights, in units of scores
  float* scores;  // [kMaxStrip][kScoreStride]
  // A chunk counts nothing for a row if none of its scores comes within this of the row's largest before: below 0, in
  // units of scores. -inf: every chunk counts.
  float skip;
  int64_t* skipped; // how many pairs of a row and a key were skipped so
};

struct AttendKernels {
  int32_t element_size;
  // Begins a tile: loads rows of q. From here to `finish` a table may hold the thread's tile registers (AMX).
  void (*load_queries)(const Rows& rows, int32_t head_dim, void* q);
  // Packs the group that begins at `key`; keys past rows.count become zeros.
  void (*pack_keys)(const Rows& rows, int32_t head_dim, int64_t key, void* k);
  void (*pack_values)(const Rows& rows, int32_t head_dim, int64_t key, void* v);
  // Means over the rows of a block, rounded to their dtype by the caller.
  void (*mean)(const Rows& rows, int32_t head_dim, float* mean);
  // Adds a chunk of packed keys to the tile.
  void (*attend)(const TileState& tile, const Chunk& chunk);
  // Adds a chunk of keys that are not packed: column i is row i of k and of v. The tile has at most kFewRows rows. Null
  // in tables of other elements than fp32.
  void (*attend_unpacked)(const TileState& tile, const Chunk& chunk, const Rows& k, const Rows& v);
  // Row r of the result is o[r] / sum[r]; lse[r] is its natural logarithm. A row without weights: zeros and -inf. With
  // `stream`, rows go past the caches.
  void (*finish)(const TileState& tile, const Rows& out, bool stream, float* lse);
};

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_ATTEND_KERNELS_H_
