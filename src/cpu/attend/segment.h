// The tiles of one segment of a mask with key lists: the keys of its list are packed once, by rows from anywhere, into
// the same panels as keys in order, and then serve all its tiles. With mean_correction a block that is left out counts
// by the means of its keys that are not in the list.
#ifndef FLASHPREFILL_CPU_ATTEND_SEGMENT_H_
#define FLASHPREFILL_CPU_ATTEND_SEGMENT_H_

#include "cpu/attend/tile.h"

namespace flashprefill::cpu {

// Means of all keys of each block of a KV head, not rounded: [blocks][head_dim]. Null without mean_correction.
struct BlockMeans {
  float* keys = nullptr;
  float* values = nullptr;

  static BlockMeans Take(Workspace& memory, int64_t head_dim, int64_t blocks) {
    float* keys = memory.Take<float>(blocks * head_dim);
    return {keys, memory.Take<float>(blocks * head_dim)};
  }
};

// The segment of mask head `mask_head` that begins with tile `first`; keys and means are those of its KV head.
void AttendSegment(const AttendCall& call, const Sequence& s, int64_t mask_head, int64_t first, const Packed& keys,
                   const BlockMeans& means, TileScratch& scratch);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_ATTEND_SEGMENT_H_
