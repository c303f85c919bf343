// FlashPrefill (arXiv 2603.06199). Blocks of 128, 2 sink, 4 window and 2 dense tail blocks are those of all models that
// its authors configure. alpha = 0.12 is their value for Qwen3-30B-A3B, between Llama's 0.18 and Qwen2.5's 0.08.
#include "core/method.h"

#include <cstddef>

namespace flashprefill::methods::flashprefill {
namespace {

constexpr Field kFields[] = {
    FloatField("alpha", offsetof(fp_flashprefill, alpha), 0.12, 0, INFINITY, FP_FIELD_DECIDES | FP_FIELD_KEEPS_FROM,
               "blocks are kept from this share of the tile's largest energy on"),
    IntField("query_pool", offsetof(fp_flashprefill, query_pool), 1, 1, kTileRows,
             "query rows per mean that is scored; 1 is the paper"),
    IntField("min_blocks", offsetof(fp_flashprefill, min_blocks), 0, 0, kMaxForcedBlocks,
             "the top blocks by energy that are always kept"),
};

} // namespace

extern const Method kMethod = {
    .kind = FP_FLASHPREFILL, .name = "flashprefill", .size = sizeof(fp_flashprefill), .fields = kFields};

} // namespace flashprefill::methods::flashprefill
