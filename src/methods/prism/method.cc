// Prism (arXiv 2602.08426). Sink and recent blocks are forced as published; how many, we chose.
#include "core/method.h"

#include <cstddef>
#include <string>

#include "core/error.h"

namespace flashprefill::methods::prism {
namespace {

constexpr int kMostDims = 512; // the largest head_dim
constexpr int kMostPairs = kMostDims / 2;

constexpr Field kFields[] = {
    ShareField("mass", offsetof(fp_prism, mass), 0.95, FP_FIELD_DECIDES | FP_FIELD_ABOVE_LEAST | FP_FIELD_KEEPS_MASS,
               "keep the smallest set of blocks with this share of a band's probability"),
    IntField("rotary_dim", offsetof(fp_prism, rotary_dim), 0, 0, kMostDims,
             "dimensions that are rotated, the first ones; 0: head_dim"),
    IntField("high_pairs", offsetof(fp_prism, high_pairs), 0, 0, kMostPairs,
             "rotary pairs in the high band, fastest first; 0: half of them"),
    IntField("low_pairs", offsetof(fp_prism, low_pairs), 0, 0, kMostPairs,
             "rotary pairs in the low band, slowest first; 0: three quarters of them"),
    BoolField("interleaved", offsetof(fp_prism, interleaved), false,
              "dimension 2i is paired with 2i + 1, not i with i + rotary_dim / 2"),
};

void CheckProblem(const Policy& policy, const Problem& p) {
  const auto& f = reinterpret_cast<const fp_prism&>(policy);
  const auto check = [](const char* name, int32_t value, int32_t most) {
    if (value > most) Refuse(name, value, "from 0 to " + std::to_string(most));
  };
  check("rotary_dim", f.rotary_dim, p.head_dim);
  if (f.rotary_dim % 2 != 0) Refuse("rotary_dim", f.rotary_dim, "even");
  const int32_t pairs = (f.rotary_dim > 0 ? f.rotary_dim : p.head_dim) / 2;
  check("high_pairs", f.high_pairs, pairs);
  check("low_pairs", f.low_pairs, pairs);
}

bool KeepsAll(const Policy& policy) { return reinterpret_cast<const fp_prism&>(policy).mass >= 1; }

} // namespace

extern const Method kMethod = {.kind = FP_PRISM,
                               .name = "prism",
                               .size = sizeof(fp_prism),
                               .common = {128, 1, 2, 0},
                               .own_heads = true,
                               .fields = kFields,
                               .check_problem = CheckProblem,
                               .keeps_everything = KeepsAll};

} // namespace flashprefill::methods::prism
