// VSPrefill (arXiv 2603.04460). The paper prints no masses; these defaults are measured: docs/methods/vsprefill.md.
#include "core/method.h"

#include <cstddef>
#include <string>

#include "core/error.h"

namespace flashprefill::methods::vsprefill {
namespace {

constexpr int kMaxHidden = 65536;

const fp_vsprefill& Of(const Policy& policy) { return reinterpret_cast<const fp_vsprefill&>(policy); }

constexpr int32_t kShare = FP_FIELD_DECIDES | FP_FIELD_ABOVE_LEAST | FP_FIELD_KEEPS_MASS;

constexpr Field kFields[] = {
    ShareField("vertical_mass", offsetof(fp_vsprefill, vertical_mass), 0.6, kShare,
               "keep the fewest verticals with this share of their predicted mass"),
    ShareField("slash_mass", offsetof(fp_vsprefill, slash_mass), 0.02, kShare,
               "keep the fewest slashes with this share of their predicted mass"),
    ChoiceField("rounding", offsetof(fp_vsprefill, rounding), FP_ROUND_TOKENS, FP_ROUND_TOKENS, "blocks tokens",
                "whether verticals and slashes become the blocks that hold some of them, or stay tokens"),
    IntField("indexer", offsetof(fp_vsprefill, indexer), 0, 0, kMaxTokens,
             "a number by which a binding knows the weights; 0: none"),
};

void Check(const Policy& policy) {
  const fp_vsprefill& v = Of(policy);
  if (v.rounding == FP_ROUND_TOKENS && v.common.mean_correction) {
    Refuse("mean_correction", 1, "0 with FP_ROUND_TOKENS: parts of blocks have no mean");
  }
  if (v.rounding == FP_ROUND_TOKENS && v.common.share_heads) {
    Refuse("share_heads", 1, "0 with FP_ROUND_TOKENS: lists of tokens are those of query heads");
  }
}

void CheckProblem(const Policy& policy, const Problem& p) {
  const fp_vsprefill& v = Of(policy);
  if (v.hidden < 0 || v.hidden > kMaxHidden) {
    Refuse("hidden", v.hidden, "from 0 to " + std::to_string(kMaxHidden));
  }
  if (v.hidden == 0 && v.indexer != 0) {
    Refuse("indexer", v.indexer, "0 without weights: this way into the library does not bring them");
  }
  if (v.hidden == 0) return;
  const auto check = [](const char* name, int32_t is, int32_t must_be) {
    if (is != must_be) {
      Refuse(std::string("the weights' ") + name, is, "the problem's (" + std::to_string(must_be) + ")");
    }
  };
  check("kv_heads", v.kv_heads, p.kv_heads);
  check("head_dim", v.head_dim, p.head_dim);
  const auto given = [](const char* name, const float* address) {
    if (!address) Refuse(name, "NULL", "the address of the indexer's weights");
  };
  given("up", v.up);
  given("bias", v.bias);
  given("vertical", v.vertical);
  given("slash", v.slash);
  if (v.logit_tokens < 0 || v.logit_tokens > kMaxTokens) {
    Refuse("logit_tokens", v.logit_tokens, "from 0 to " + std::to_string(kMaxTokens));
  }
  if (reinterpret_cast<uintptr_t>(v.logits) % alignof(fp_vsprefill_logits) != 0) {
    Refuse("logits", v.logits, "aligned to 8 bytes");
  }
}

bool KeepsAll(const Policy& policy) { return Of(policy).vertical_mass >= 1 || Of(policy).slash_mass >= 1; }

VerticalSlashRoom Room(const Problem& p, const Policy& policy) {
  if (Of(policy).rounding != FP_ROUND_TOKENS) return {};
  return {p.max_seqlen_k, p.max_seqlen_k}; // a softmax may be flat
}

} // namespace

extern const Method kMethod = {.kind = FP_VSPREFILL,
                               .name = "vsprefill",
                               .size = sizeof(fp_vsprefill),
                               .common = {64, 1, 2, 0},
                               .fields = kFields,
                               .check = Check,
                               .check_problem = CheckProblem,
                               .keeps_everything = KeepsAll,
                               .vertical_slash_room = Room};

} // namespace flashprefill::methods::vsprefill
