// Summary keys, the short form of the mean correction: one key and value for the blocks left out of FP_SUMMARY_BLOCKS
// neighbouring ones. They are what the tile's mean query itself attends to among the means of these blocks, with the
// means of their keys once more in the place of values: a softmax over at most FP_SUMMARY_BLOCKS columns, by the
// kernel for few rows. A tile then has a column per FP_SUMMARY_BLOCKS blocks and head, where means have one per block.
#ifndef FLASHPREFILL_CPU_ATTEND_SUMMARY_H_
#define FLASHPREFILL_CPU_ATTEND_SUMMARY_H_

#include "cpu/attend/chunk_builder.h"

namespace flashprefill::cpu {

// Adds the summary keys of a tile's blocks that are left out and seen whole by all rows.
void AddSummaries(const AttendCall& call, const TileRows& rows, const uint64_t* bits, const MeanRows& means,
                  TileScratch& scratch);

} // namespace flashprefill::cpu

#endif // FLASHPREFILL_CPU_ATTEND_SUMMARY_H_
