// The row of a method: everything that the library has to know about it besides how it selects. Defaults, refusals,
// the text form and the scratch memory of masks are loops over rows, so nothing here or in the backends names a method.
//
// A method is a folder of src/methods with method.cc, which defines its row as `extern const Method kMethod` in the
// namespace flashprefill::methods::FOLDER, and a file for each backend that selects by it. CMake collects the folders
// and writes the tables (cmake/methods.cmake).
#ifndef FLASHPREFILL_CORE_METHOD_H_
#define FLASHPREFILL_CORE_METHOD_H_

#include <cmath>
#include <limits>
#include <span>
#include <string>

#include "core/key_list.h"
#include "core/types.h"
#include "core/vertical_slash.h"

namespace flashprefill {

using Field = fp_policy_field;

// Defaults of the fields that all policies share.
struct CommonDefaults {
  int32_t block_size = 128, sink_blocks = 2, window_blocks = 4, dense_tail_blocks = 2, share_heads = 0;
};

struct Method {
  int32_t kind;     // fp_policy_kind
  const char* name; // in text
  size_t size;      // of the policy's struct
  CommonDefaults common = {};
  bool own_heads = false;             // each query head selects for itself: share_heads must be 0
  bool selects = true;                // false: it keeps everything, so that forced blocks have no meaning (Dense)
  bool without_causal = false;        // selects too where every query sees every key; else it needs causal=1
  std::span<const Field> fields = {}; // the method's own

  // Hooks; null where there is nothing to say. Fields are inside their ranges by then.
  void (*check)(const Policy&) = nullptr;                                      // fields against each other
  void (*check_problem)(const Policy&, const Problem&) = nullptr;              // fields against the problem
  bool (*keeps_everything)(const Policy&) = nullptr;                           // whatever the scores are: a share of 1
  bool (*too_short)(const Problem&, const Policy&, const Sequence&) = nullptr; // to select for
  VerticalSlashRoom (*vertical_slash_room)(const Problem&, const Policy&) = nullptr; // on the CPU
  KeyListRoom (*key_list_room)(const Problem&, const Policy&) = nullptr;
  float (*skip)(const Policy&) = nullptr; // of fp_block_mask
};

std::span<const Method* const> Methods();     // all of this build, by folder
const Method* FindMethod(int32_t kind);       // null for a kind that is not there
const Method& MethodOf(const Policy& policy); // of a policy that was validated

// ---------------------------------------------------------------- fields

constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max(); // lengths travel as int32 in cu_seqlens
constexpr int kMaxForcedBlocks = 1 << 24; // more blocks than the longest sequence has; keeps products inside int64
constexpr double kNotGiven = std::numeric_limits<double>::quiet_NaN();

// Makers of fields. `about` is one line.
constexpr Field IntField(const char* name, size_t offset, double initial, double least, double most,
                         const char* about) {
  return {name, about, "", initial, least, most, offset, 0, FP_FIELD_INT, 0, 0, 0};
}
constexpr Field FloatField(const char* name, size_t offset, double initial, double least, double most, int32_t flags,
                           const char* about) {
  return {name, about, "", initial, least, most, offset, 0, FP_FIELD_FLOAT, flags, 0, 0};
}
constexpr Field BoolField(const char* name, size_t offset, bool initial, const char* about) {
  return {name, about, "", initial ? 1.0 : 0.0, 0, 1, offset, 0, FP_FIELD_BOOL, 0, 0, 0};
}
constexpr Field ChoiceField(const char* name, size_t offset, int initial, int most, const char* choices,
                            const char* about) {
  return {name, about, choices, static_cast<double>(initial), 0, static_cast<double>(most), offset, 0, FP_FIELD_CHOICE,
          0,    0,     0};
}
// A row for each query head, or none at all.
constexpr Field TableField(const char* name, int32_t type, size_t offset, size_t count_offset, int32_t columns,
                           int32_t flags, const char* about) {
  return {name, about, "", 0, 0, 0, offset, count_offset, type, flags, columns, 0};
}
// What attend leaves out on its own: see fp_block_mask.
constexpr Field SkipField(size_t offset) {
  return FloatField("skip", offset, 0, 0, 1, FP_FIELD_BELOW_MOST,
                    "attend skips keys below this share of the heaviest weight so far; 0: none");
}
// A share of something, in (0, 1] or [0, 1].
constexpr Field ShareField(const char* name, size_t offset, double initial, int32_t flags, const char* about) {
  return FloatField(name, offset, initial, 0, 1, flags, about);
}

bool IsTable(const Field& field);
bool MayBeNotGiven(const Field& field);                          // its value may be NaN
double FieldValue(const Policy& policy, const Field& field);     // of a field that is no table; NaN: not given
void SetField(Policy& policy, const Field& field, double value); // the same
int32_t TableRows(const Policy& policy, const Field& field);

// The field at an index, the method's own first, then those of fp_policy that it has. Null past the end.
const Field* FieldAt(const Method& method, int32_t index);

// ---------------------------------------------------------------- policies

constexpr size_t kMostPolicyBytes = 256; // of a policy's struct

void InitPolicy(const Method& method, Policy& policy);        // policy has room for method.size bytes
void CheckFields(const Method& method, const Policy& policy); // all that can be said without a problem
void CheckStride(int32_t stride, int32_t block_size);         // tokens per cell, of strided methods

// Whether a policy keeps everything whatever the scores are: Dense, and a share of 1. Estimates of a block's mass may
// be 0, so adding them up would not get there.
bool KeepsEverything(const Policy& policy);

// fp_fallback of a sequence, the one answer that every backend gives. Where it is not FP_SELECTED everything is kept.
int32_t FallbackOf(const Problem& p, const Geometry& g, const Policy& policy, const Sequence& s);

// What a mask of this policy needs room for.
VerticalSlashRoom VerticalSlashRoomOf(const Problem& p, const Policy& policy);
KeyListRoom KeyListRoomOf(const Problem& p, const Policy& policy);

float SkipOf(const Policy& policy); // of its masks

// The policy of query heads [first, first + heads) alone, with `factor` times the budget: see fp_field_flags. `tables`
// has room for TableWords(policy, heads) words. Returns whether the policy has a budget.
bool WithBudget(const Policy& policy, int64_t first, int64_t heads, double factor, Policy& to, int32_t* tables);
int64_t TableWords(const Policy& policy, int64_t heads);

// Text: see fp_policy_parse and fp_policy_print.
size_t ParsePolicy(const char* text, void* policy, size_t size); // returns the bytes that the policy takes
std::string PrintPolicy(const Policy& policy);

} // namespace flashprefill

#endif // FLASHPREFILL_CORE_METHOD_H_
