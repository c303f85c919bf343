// What attend skips of a mask's kept blocks: see fp_block_mask. The reference and the CPU share where chunks begin;
// what a chunk weighs they say each for themselves.
#ifndef FLASHPREFILL_CORE_SKIP_H_
#define FLASHPREFILL_CORE_SKIP_H_

#include "core/types.h"

namespace flashprefill {

constexpr int64_t kSkipKeys = 128;   // of a chunk
constexpr int64_t kRowsThatSkip = 9; // of a KV head, at least: with fewer, reading the keys is all the time there is

inline bool Skips(const Problem& p, const BlockMask& mask, const Sequence& s) {
  return mask.skip > 0 && s.q_len * (p.q_heads / p.kv_heads) >= kRowsThatSkip;
}

// What `pairs` skipped pairs of a row and a key are in blocks, on average of the tile's rows.
inline int32_t SkippedBlocks(int64_t pairs, int64_t rows, int64_t block_size) {
  return static_cast<int32_t>((pairs + rows * block_size / 2) / (rows * block_size));
}

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_SKIP_H_
