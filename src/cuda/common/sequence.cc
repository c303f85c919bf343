// Problems and tile rules as kernel arguments: the host's side of sequence.cuh.
#include "cuda/common/sequence.cuh"

#include <algorithm>

#include "core/method.h"

namespace flashprefill::cuda {

DeviceProblem DeviceProblem::Of(const Problem& problem) {
  DeviceProblem d{};
  d.p = problem;
  for (int b = 0; problem.final_chunks && b < std::min(problem.batch, kMaxFinalChunks); ++b) {
    if (problem.final_chunks[b]) d.final_bits[b / 64] |= uint64_t{1} << (b % 64);
  }
  return d;
}

TileRules TileRules::Of(const Geometry& g) {
  TileRules r{};
  r.block_size = g.block_size;
  r.tile_tokens = g.tile_tokens;
  r.heads_per_tile = g.heads_per_tile;
  r.units_per_kv = g.group / g.heads_per_tile;
  r.tile_rows = static_cast<int>(g.tile_rows);
  r.by_block = Divider::Of(r.block_size);
  r.by_tile = Divider::Of(r.tile_tokens);
  r.by_units = Divider::Of(r.units_per_kv);
  return r;
}

TileRules TileRules::Of(const Problem& p, const Policy& policy) {
  const Geometry g = Geometry::Of(p, policy);
  TileRules r = Of(g);
  r.sink_blocks = policy.sink_blocks;
  r.window_reach = std::max(0, policy.window_blocks - 1);
  const int64_t tail = DivUp<int64_t>(int64_t{policy.dense_tail_blocks} * policy.block_size, g.tile_tokens);
  r.tail_tiles = static_cast<int>(std::min<int64_t>(tail, 1 << 30));
  r.keeps_everything = flashprefill::KeepsEverything(policy);
  r.shared = policy.share_heads != 0;
  return r;
}

} // namespace flashprefill::cuda
