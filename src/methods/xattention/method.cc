// XAttention (arXiv 2503.16428). The paper's stride of 16; its mandatory blocks are the first one and the diagonal.
#include "core/method.h"

#include <cstddef>
#include <string>

#include "core/error.h"

namespace flashprefill::methods::xattention {
namespace {

const fp_xattention& Of(const Policy& policy) { return reinterpret_cast<const fp_xattention&>(policy); }

constexpr Field kFields[] = {
    ShareField("threshold", offsetof(fp_xattention, threshold), 0.9, FP_FIELD_DECIDES | FP_FIELD_KEEPS_MASS,
               "share of the tile's mass to keep; 0 keeps the forced blocks alone"),
    FloatField("norm", offsetof(fp_xattention, norm), 1, 0, INFINITY, FP_FIELD_ABOVE_LEAST,
               "scores are divided by stride * norm"),
    IntField("stride", offsetof(fp_xattention, stride), 16, 4, kTileRows,
             "tokens per cell: 4, 8, 16, 32, 64 or 128, and a divisor of block_size"),
    TableField("head_thresholds", FP_FIELD_FLOAT_TABLE, offsetof(fp_xattention, head_thresholds),
               offsetof(fp_xattention, head_count), 1, FP_FIELD_KEEPS_MASS,
               "a threshold of each query head, in place of threshold"),
};

void Check(const Policy& policy) { CheckStride(Of(policy).stride, policy.block_size); }

void CheckProblem(const Policy& policy, const Problem& p) {
  const fp_xattention& x = Of(policy);
  if (x.head_count != 0 && x.head_count != p.q_heads) {
    Refuse("head_count", x.head_count, "the problem's q_heads (" + std::to_string(p.q_heads) + "), or 0: no list");
  }
  if (x.head_count > 0 && !x.head_thresholds) {
    Refuse("head_thresholds", "NULL", "the address of the thresholds of all heads");
  }
  for (int h = 0; h < x.head_count; ++h) {
    const float share = x.head_thresholds[h];
    if (!(share >= 0 && share <= 1)) {
      Refuse("head_thresholds[" + std::to_string(h) + "]", share, "at least 0 and at most 1");
    }
  }
}

bool KeepsAll(const Policy& policy) { return Of(policy).head_count == 0 && Of(policy).threshold >= 1; }

} // namespace

extern const Method kMethod = {.kind = FP_XATTENTION,
                               .name = "xattention",
                               .size = sizeof(fp_xattention),
                               .common = {128, 1, 1, 0},
                               .own_heads = true,
                               .without_causal = true,
                               .fields = kFields,
                               .check = Check,
                               .check_problem = CheckProblem,
                               .keeps_everything = KeepsAll};

} // namespace flashprefill::methods::xattention
