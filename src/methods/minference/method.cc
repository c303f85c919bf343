// MInference (arXiv 2407.02490). The defaults are what it uses for heads that its tables don't have, over its kernels'
// blocks of 64.
#include "core/method.h"

#include <algorithm>
#include <cstddef>
#include <string>

#include "core/error.h"
#include "methods/minference/patterns.h"

namespace flashprefill::methods::minference {
namespace {

const fp_minference& Of(const Policy& policy) { return reinterpret_cast<const fp_minference&>(policy); }

constexpr Field kFields[] = {
    IntField("vertical", offsetof(fp_minference, vertical), 1000, 0, kMaxTokens, "tokens: verticals that a head keeps"),
    IntField("slash", offsetof(fp_minference, slash), 6096, 0, kMaxTokens, "tokens: slashes that a head keeps"),
    ChoiceField("rounding", offsetof(fp_minference, rounding), FP_ROUND_BLOCKS, FP_ROUND_TOKENS, "blocks tokens",
                "whether verticals and slashes become the blocks that hold some of them, or stay tokens"),
    TableField("heads", FP_FIELD_INT_TABLE, offsetof(fp_minference, heads), offsetof(fp_minference, head_count), 3, 0,
               "(fp_minference_pattern, a, b) of each query head, in place of vertical and slash"),
};

void Check(const Policy& policy) {
  const fp_minference& m = Of(policy);
  if (m.rounding == FP_ROUND_TOKENS && m.common.mean_correction) {
    Refuse("mean_correction", m.common.mean_correction, "0 with FP_ROUND_TOKENS: parts of blocks have no mean");
  }
}

void CheckProblem(const Policy& policy, const Problem& p) {
  const fp_minference& m = Of(policy);
  if (m.head_count != 0 && m.head_count != p.q_heads) {
    Refuse("head_count", m.head_count, "the problem's q_heads (" + std::to_string(p.q_heads) + "), or 0: no list");
  }
  if (m.head_count > 0 && !m.heads) Refuse("heads", "NULL", "the address of the patterns of all heads");
  const auto check = [](const std::string& name, int32_t value, int64_t most) {
    if (value < 0 || value > most) Refuse(name, value, "from 0 to " + std::to_string(most));
  };
  for (int h = 0; h < m.head_count; ++h) {
    const std::string at = "heads[" + std::to_string(h) + "].";
    check(at + "pattern", m.heads[h].pattern, FP_BLOCK_SPARSE);
    check(at + "a", m.heads[h].a, kMaxTokens);
    check(at + "b", m.heads[h].b, kMaxTokens);
  }
}

// Whether a pattern asks for all keys anyway.
bool TakesAll(const fp_minference_head& head, int block_size, int64_t keys) {
  if (head.pattern == FP_A_SHAPE) return int64_t{head.a} + head.b >= keys;
  if (head.pattern == FP_BLOCK_SPARSE) return int64_t{head.a} * block_size >= keys;
  return VerticalsOf(head) >= keys || SlashesOf(head) >= keys;
}

// It selects for more than one query row, unless every head asks for all keys anyway.
bool TooShort(const Problem& p, const Policy& policy, const Sequence& s) {
  if (s.q_len == 1) return true;
  for (int64_t h = 0; h < PatternCount(Of(policy), p); ++h) {
    if (!TakesAll(PatternOf(Of(policy), h), policy.block_size, s.k_len)) return false;
  }
  return true;
}

VerticalSlashRoom Room(const Problem& p, const Policy& policy) {
  VerticalSlashRoom room;
  if (Of(policy).rounding != FP_ROUND_TOKENS) return room;
  for (int64_t h = 0; h < PatternCount(Of(policy), p); ++h) {
    const fp_minference_head head = PatternOf(Of(policy), h);
    if (head.pattern != FP_VERTICAL_SLASH) continue;
    room.verticals = std::max(room.verticals, VerticalsOf(head));
    room.slashes = std::max(room.slashes, SlashesOf(head));
  }
  return {std::min(room.verticals, p.max_seqlen_k), std::min(room.slashes, p.max_seqlen_k)};
}

} // namespace

extern const Method kMethod = {.kind = FP_MINFERENCE,
                               .name = "minference",
                               .size = sizeof(fp_minference),
                               .common = {64, 0, 0, 0},
                               .own_heads = true,
                               .fields = kFields,
                               .check = Check,
                               .check_problem = CheckProblem,
                               .too_short = TooShort,
                               .vertical_slash_room = Room};

} // namespace flashprefill::methods::minference
