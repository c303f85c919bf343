// S2O (arXiv 2602.22575): the keys before a segment in the order of its mean query, until they add too little. Its text
// gives neither the length of a segment nor the threshold; docs/methods/s2o.md says where these come from.
#include "core/method.h"

#include <cstddef>

#include "core/segment.h"

namespace flashprefill::methods::s2o {
namespace {

constexpr Field kFields[] = {
    FloatField("tau", offsetof(fp_s2o, tau), 0.03, 0, 1, FP_FIELD_DECIDES | FP_FIELD_BELOW_MOST | FP_FIELD_KEEPS_FROM,
               "stop where 128 keys add less than this share of what is summed up, twice in a row"),
    IntField("segment", offsetof(fp_s2o, segment), 512, 1, 65536, "query tokens per list of keys, in whole tiles"),
    IntField("max_keys", offsetof(fp_s2o, max_keys), 8192, 128, 1 << 20,
             "keys that a list has room for; where more are wanted it holds the best"),
    IntField("stop_rows", offsetof(fp_s2o, stop_rows), 32, 1, 65536,
             "rows of a segment and head whose sums decide when to stop"),
};

bool KeepsAll(const Policy& policy) { return reinterpret_cast<const fp_s2o&>(policy).tau == 0; }

KeyListRoom Room(const Problem& p, const Policy& policy) {
  const auto& own = reinterpret_cast<const fp_s2o&>(policy);
  return {std::min<int64_t>(own.max_keys, p.max_seqlen_k), SegmentTiles(own.segment, Geometry::Of(p, policy))};
}

} // namespace

extern const Method kMethod = {.kind = FP_S2O,
                               .name = "s2o",
                               .size = sizeof(fp_s2o),
                               .common = {32, 0, 1, 0},
                               .fields = kFields,
                               .keeps_everything = KeepsAll,
                               .key_list_room = Room};

} // namespace flashprefill::methods::s2o
