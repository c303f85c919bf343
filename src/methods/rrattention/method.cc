// RRAttention (arXiv 2602.05853). The more careful of its two published settings; its keep_sink and keep_recent are the
// forced blocks.
#include "core/method.h"

#include <cstddef>

namespace flashprefill::methods::rrattention {
namespace {

constexpr Field kFields[] = {
    ShareField("threshold", offsetof(fp_rrattention, threshold), 0.95,
               FP_FIELD_DECIDES | FP_FIELD_ABOVE_LEAST | FP_FIELD_KEEPS_MASS,
               "keep the smallest set of blocks with this share of the tile's mass"),
    IntField("stride", offsetof(fp_rrattention, stride), 8, 4, kTileRows,
             "tokens per cell: 4, 8, 16, 32, 64 or 128, and a divisor of block_size"),
};

void Check(const Policy& policy) {
  CheckStride(reinterpret_cast<const fp_rrattention&>(policy).stride, policy.block_size);
}

bool KeepsAll(const Policy& policy) { return reinterpret_cast<const fp_rrattention&>(policy).threshold >= 1; }

} // namespace

extern const Method kMethod = {.kind = FP_RRATTENTION,
                               .name = "rrattention",
                               .size = sizeof(fp_rrattention),
                               .common = {128, 1, 1, 0},
                               .own_heads = true,
                               .fields = kFields,
                               .check = Check,
                               .keeps_everything = KeepsAll};

} // namespace flashprefill::methods::rrattention
