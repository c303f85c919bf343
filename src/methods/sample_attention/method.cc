// SampleAttention (arXiv 2406.15486). The paper's alpha, row ratio and window; the rows per segment we chose.
#include "core/method.h"

#include <cstddef>

namespace flashprefill::methods::sample_attention {
namespace {

constexpr Field kFields[] = {
    ShareField("coverage", offsetof(fp_sample_attention, coverage), 0.95,
               FP_FIELD_DECIDES | FP_FIELD_ABOVE_LEAST | FP_FIELD_KEEPS_MASS,
               "keep the smallest sets of verticals and of slashes with this share of the mass"),
    ShareField("sample_ratio", offsetof(fp_sample_attention, sample_ratio), 0.05, FP_FIELD_ABOVE_LEAST,
               "share of the query rows that are sampled"),
    ShareField("window_ratio", offsetof(fp_sample_attention, window_ratio), 0.08, 0,
               "tokens before a tile that are kept, as a share of the sequence's keys"),
    IntField("sample_rows", offsetof(fp_sample_attention, sample_rows), 32, 1, kTileRows,
             "rows sampled at the end of each segment of about sample_rows / sample_ratio rows"),
};

bool KeepsAll(const Policy& policy) { return reinterpret_cast<const fp_sample_attention&>(policy).coverage >= 1; }

} // namespace

extern const Method kMethod = {.kind = FP_SAMPLE_ATTENTION,
                               .name = "sampleattention",
                               .size = sizeof(fp_sample_attention),
                               .common = {128, 1, 1, 0},
                               .own_heads = true,
                               .fields = kFields,
                               .keeps_everything = KeepsAll};

} // namespace flashprefill::methods::sample_attention
