// Gather, our own: single keys in place of blocks, ranked once for a segment of queries. S2O (arXiv 2602.22575) is its
// published relative.
#include "core/method.h"

#include <cmath>
#include <cstddef>

#include "core/error.h"
#include "methods/gather/segment.h"

namespace flashprefill::methods::gather {
namespace {

constexpr int32_t kAlternative = FP_FIELD_ALTERNATIVE | FP_FIELD_DECIDES;

constexpr Field kFields[] = {
    ShareField("gain", offsetof(fp_gather, gain), 0.002,
               kAlternative | FP_FIELD_ABOVE_LEAST | FP_FIELD_BELOW_MOST | FP_FIELD_KEEPS_FROM,
               "keep keys, the best first, while 128 * share * sqrt(rest) is at least this"),
    ShareField("budget", offsetof(fp_gather, budget), kNotGiven,
               kAlternative | FP_FIELD_ABOVE_LEAST | FP_FIELD_KEEPS_SHARE,
               "keep this share of the keys that are ranked, the best"),
    IntField("segment", offsetof(fp_gather, segment), 128, 1, 65536, "query tokens per list of keys, in whole tiles"),
    IntField("max_keys", offsetof(fp_gather, max_keys), 8192, 128, 1 << 20,
             "keys that a list has room for; where more are wanted it holds the best"),
};

void Check(const Policy& policy) {
  const auto& g = reinterpret_cast<const fp_gather&>(policy);
  if (!std::isnan(g.gain) + !std::isnan(g.budget) != 1) {
    Refuse("gain", g.gain, "given where budget is NaN, and NaN where it is given: one decides");
  }
}

bool KeepsAll(const Policy& policy) { return reinterpret_cast<const fp_gather&>(policy).budget >= 1; }

KeyListRoom Room(const Problem& p, const Policy& policy) {
  const auto& own = reinterpret_cast<const fp_gather&>(policy);
  return {std::min<int64_t>(own.max_keys, p.max_seqlen_k), SegmentTiles(own.segment, Geometry::Of(p, policy))};
}

} // namespace

extern const Method kMethod = {.kind = FP_GATHER,
                               .name = "gather",
                               .size = sizeof(fp_gather),
                               .common = {32, 1, 32, 8, 1},
                               .fields = kFields,
                               .check = Check,
                               .keeps_everything = KeepsAll,
                               .key_list_room = Room};

} // namespace flashprefill::methods::gather
