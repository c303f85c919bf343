// SpargeAttn (arXiv 2502.18137), its first stage by its cdf interface; its second, `skip`, is off unless it is asked
// for. Its kernels take blocks of 64 keys.
#include "core/method.h"

#include <cmath>
#include <cstddef>

#include "core/error.h"

namespace flashprefill::methods::sparge_attn {
namespace {

constexpr int32_t kAlternative = FP_FIELD_ALTERNATIVE | FP_FIELD_DECIDES;

constexpr Field kFields[] = {
    FloatField(
        "similarity", offsetof(fp_sparge_attn, similarity), kNotGiven, -1, 1, FP_FIELD_OPTIONAL,
        "mean cosine of a block's tokens above which the block is self-similar; none: 0.6 with cdf, -0.1 with topk"),
    ShareField("cdf", offsetof(fp_sparge_attn, cdf), 0.98, kAlternative | FP_FIELD_KEEPS_MASS,
               "keep the top blocks whose probabilities sum up to at most this"),
    ShareField("topk", offsetof(fp_sparge_attn, topk), kNotGiven, kAlternative | FP_FIELD_KEEPS_SHARE,
               "keep this share of all key blocks, the top ones"),
    SkipField(offsetof(fp_sparge_attn, skip)),
};

void Check(const Policy& policy) {
  const auto& s = reinterpret_cast<const fp_sparge_attn&>(policy);
  if (std::isnan(s.cdf) == std::isnan(s.topk)) {
    Refuse("cdf", s.cdf, "given where topk is not, and NaN where topk is given: one of the two decides");
  }
}

bool KeepsAll(const Policy& policy) {
  const auto& s = reinterpret_cast<const fp_sparge_attn&>(policy);
  return s.cdf >= 1 || s.topk >= 1; // one of them is NaN
}

float Skip(const Policy& policy) { return reinterpret_cast<const fp_sparge_attn&>(policy).skip; }

} // namespace

extern const Method kMethod = {.kind = FP_SPARGE_ATTN,
                               .name = "spargeattn",
                               .size = sizeof(fp_sparge_attn),
                               .common = {64, 0, 0, 0},
                               .own_heads = true,
                               .without_causal = true,
                               .fields = kFields,
                               .check = Check,
                               .keeps_everything = KeepsAll,
                               .skip = Skip};

} // namespace flashprefill::methods::sparge_attn
