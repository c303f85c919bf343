// FlexPrefill (arXiv 2502.20766). gamma, tau and min_budget are those of its authors' example; nothing is forced but
// what it forces itself.
#include "core/method.h"

#include <algorithm>
#include <cstddef>
#include <string>

#include "core/error.h"

namespace flashprefill::methods::flexprefill {
namespace {

const fp_flexprefill& Of(const Policy& policy) { return reinterpret_cast<const fp_flexprefill&>(policy); }

constexpr Field NoLimit(Field field) {
  field.flags = FP_FIELD_ZERO_IS_NONE;
  return field;
}

constexpr Field kFields[] = {
    ShareField("gamma", offsetof(fp_flexprefill, gamma), 0.9,
               FP_FIELD_DECIDES | FP_FIELD_ABOVE_LEAST | FP_FIELD_KEEPS_MASS, "share of the attention mass to keep"),
    FloatField("tau", offsetof(fp_flexprefill, tau), 0.1, 0, INFINITY, 0,
               "Jensen-Shannon distance below which a head is query-aware; 0: none is"),
    IntField("min_budget", offsetof(fp_flexprefill, min_budget), 512, 0, kMaxTokens,
             "tokens that verticals and slashes hold at least, rounded up to blocks"),
    NoLimit(IntField("max_budget", offsetof(fp_flexprefill, max_budget), 0, 0, kMaxTokens,
                     "tokens that they hold at most; none is no limit")),
    ChoiceField("cover", offsetof(fp_flexprefill, cover), FP_COVER_FIRST, FP_COVER_BOTH, "first both",
                "which of the two block diagonals that a slash crosses is kept; first is as published"),
};

void Check(const Policy& policy) {
  const fp_flexprefill& f = Of(policy);
  if (f.max_budget > 0 && f.max_budget < f.min_budget) {
    Refuse("max_budget", f.max_budget, "at least min_budget (" + std::to_string(f.min_budget) + "), or 0: no limit");
  }
}

// It selects for more keys than two blocks and than its least budget, for more than one query row.
bool TooShort(const Problem&, const Policy& policy, const Sequence& s) {
  const int64_t size = policy.block_size;
  return s.q_len == 1 || s.k_len <= std::max(2 * size, DivUp<int64_t>(Of(policy).min_budget, size) * size);
}

bool KeepsAll(const Policy& policy) { return Of(policy).gamma >= 1 && Of(policy).max_budget == 0; }

} // namespace

extern const Method kMethod = {.kind = FP_FLEXPREFILL,
                               .name = "flexprefill",
                               .size = sizeof(fp_flexprefill),
                               .common = {128, 0, 0, 0},
                               .own_heads = true,
                               .fields = kFields,
                               .check = Check,
                               .keeps_everything = KeepsAll,
                               .too_short = TooShort};

} // namespace flashprefill::methods::flexprefill
