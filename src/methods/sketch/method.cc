// Sketch, our own: FlashPrefill whose blocks are described by their outliers beside the rest's mean and variance.
#include "core/method.h"

#include <cmath>
#include <cstddef>

#include "core/error.h"

namespace flashprefill::methods::sketch {
namespace {

constexpr int32_t kAlternative = FP_FIELD_ALTERNATIVE | FP_FIELD_DECIDES;

constexpr Field kFields[] = {
    ShareField("mass", offsetof(fp_sketch, mass), 0.95, kAlternative | FP_FIELD_ABOVE_LEAST | FP_FIELD_KEEPS_MASS,
               "keep the smallest set of blocks with this share of the tile's energy"),
    FloatField("alpha", offsetof(fp_sketch, alpha), kNotGiven, 0, INFINITY, kAlternative | FP_FIELD_KEEPS_FROM,
               "keep blocks from this share of the tile's largest energy on"),
    IntField("outliers", offsetof(fp_sketch, outliers), 4, 0, 16, "keys per block that stand for themselves"),
    IntField("query_pool", offsetof(fp_sketch, query_pool), 16, 1, kTileRows, "query rows per mean that is scored"),
    IntField("min_blocks", offsetof(fp_sketch, min_blocks), 0, 0, kMaxForcedBlocks,
             "the top blocks by energy that are always kept"),
    ShareField("gain", offsetof(fp_sketch, gain), kNotGiven,
               kAlternative | FP_FIELD_ABOVE_LEAST | FP_FIELD_BELOW_MOST | FP_FIELD_KEEPS_FROM,
               "keep blocks, the best first, while share * sqrt(rest) is at least this"),
    BoolField("query_metric", offsetof(fp_sketch, query_metric), false,
              "outliers are the keys farthest from the mean as queries see it"),
};

void Check(const Policy& policy) {
  const auto& s = reinterpret_cast<const fp_sketch&>(policy);
  if (!std::isnan(s.alpha) + !std::isnan(s.mass) + !std::isnan(s.gain) != 1) {
    Refuse("mass", s.mass, "given where alpha and gain are NaN, and NaN where one of them is given: one decides");
  }
}

bool KeepsAll(const Policy& policy) { return reinterpret_cast<const fp_sketch&>(policy).mass >= 1; }

} // namespace

extern const Method kMethod = {.kind = FP_SKETCH,
                               .name = "sketch",
                               .size = sizeof(fp_sketch),
                               .fields = kFields,
                               .check = Check,
                               .keeps_everything = KeepsAll};

} // namespace flashprefill::methods::sketch
