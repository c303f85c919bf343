// The arithmetic of policies that choose for a whole head by a few rows of scores (vertical_slash.h), one table
// of functions for each instruction set.
//
// Scores have query rows as lanes: *panels* hold 32 rows each, as [head_dim][32], and keys pass by as plain fp32 rows
// whose elements are broadcast. So keys are loaded once and never transposed, and what a row needs for its softmax, its
// largest score and its sum of powers, is kept lane by lane. Rows may be tokens, last row first, or means of blocks.
#ifndef FLASHPREFILL_CPU_VERTICAL_SLASH_KERNELS_H_
#define FLASHPREFILL_CPU_VERTICAL_SLASH_KERNELS_H_

#include "core/types.h"

namespace flashprefill::cpu {

constexpr int kPanelRows = 32;          // query rows per panel
constexpr int kChunkKeys = 64;          // keys scored at a time: 64 x 128 scores are 32 KiB
constexpr float kLeastScore = -3.0e38f; // below every score, and finite

// Scores of kChunkKeys keys at most by all lanes, as [key][lanes]; lanes is a multiple of kPanelRows.
struct ScoreChunk {
  const float* panels; // [lanes / 32][depth][32], exponents of two
  const float* keys;   // [count][depth]
  const int32_t* seen; // [lanes]: a lane sees keys below seen[lane], counted as `first` is
  int64_t depth, first, count, lanes;
  float* scores; // [count][lanes]; -inf where the lane does not see the key or the product is not finite
};

// The second layer of an indexer (VSPrefill) for a chunk of keys.
struct Activation {
  const float* of_keys;   // [count][lanes]
  const float* of_values; // [count][lanes]
  const float* bias;      // [lanes]
  const float* weights;   // [2][lanes], 0 for lanes that are no unit
  int64_t count, lanes;
  float* sums; // [count][2]; not finite where a unit is not
};

// Lanes in groups: lane h * size + i is number i of group h. What belongs together is number i of all groups, and its
// energy for a key is the root mean square over the groups of power * factor.
struct LaneGroups {
  int64_t groups, size, lanes;
  const float* factors; // [lanes + kVectorPad]
  int64_t stride;       // of a key's energies: a multiple of kVectorPad, `size` at least
};

constexpr int kVectorPad = 16; // floats: rows of powers, [count][lanes], are read so far beyond the last one at most

struct VerticalSlashKernels {
  // Query rows or keys [begin, end) of one head as fp32 rows.
  void (*load_queries)(const Problem& p, const Sequence& s, int64_t begin, int64_t end, int64_t head, float* rows);
  void (*load_keys)(const Problem& p, const Sequence& s, int64_t begin, int64_t end, int64_t kv_head, float* rows);
  void (*load_values)(const Problem& p, const Sequence& s, int64_t begin, int64_t end, int64_t kv_head, float* rows);
  // sum[0, depth) += the sum of n rows.
  void (*add_rows)(const float* rows, int64_t n, int64_t depth, float* sum);
  void (*score)(const ScoreChunk& chunk);
  // Brings each lane's largest score and sum of 2^(score - largest) up to date. They begin as kLeastScore and 0.
  void (*add_to_sums)(const ScoreChunk& chunk, float* largest, float* sums);
  // The same, and scores become powers 2^(score - largest), of the largest so far.
  void (*raise)(const ScoreChunk& chunk, float* largest, float* sums);
  // Scores become shares of their row: 2^(score - reference[lane]).
  void (*share)(const ScoreChunk& chunk, const float* reference);
  void (*root_mean_squares)(const LaneGroups& groups, const float* powers, int64_t count, float* energies);
  // column[key] = the sum of the key's shares, diagonal[key + lane] += each share.
  void (*add_vertical_slash)(const ScoreChunk& chunk, float* column, float* diagonal);
  // Of hidden units, which are lanes: two sums of SiLU(keys' part + values' part + bias) per key.
  void (*activate)(const Activation& activation);
};

const VerticalSlashKernels& VerticalSlashKernelsFor(const Exec& exec);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_VERTICAL_SLASH_KERNELS_H_
