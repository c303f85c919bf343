// What follows from a method's row: a policy's defaults, the check of its fields, and whether a sequence is selected
// for at all.
#include "core/method.h"

#include <cstddef>
#include <cstring>
#include <sstream>
#include <string>

#include "core/error.h"

namespace flashprefill {
namespace {

constexpr size_t kBlockSize = offsetof(fp_policy, block_size);
constexpr size_t kShareHeads = offsetof(fp_policy, share_heads);

// The fields of fp_policy. Their defaults are the method's (CommonDefaults).
constexpr Field kCommonFields[] = {
    IntField("block_size", kBlockSize, 0, 16, 1024, "keys per block, a multiple of 16"),
    IntField("sink_blocks", offsetof(fp_policy, sink_blocks), 0, 0, kMaxForcedBlocks,
             "blocks at the beginning that are always kept"),
    IntField("window_blocks", offsetof(fp_policy, window_blocks), 0, 0, kMaxForcedBlocks,
             "blocks before and at the diagonal that are always kept"),
    IntField("dense_tail_blocks", offsetof(fp_policy, dense_tail_blocks), 0, 0, kMaxForcedBlocks,
             "the last query tiles, in blocks, that keep everything"),
    BoolField("share_heads", kShareHeads, false, "one list for the query heads of a KV head"),
    ChoiceField("mean_correction", offsetof(fp_policy, mean_correction), FP_NO_CORRECTION, FP_SUMMARY_KEYS,
                "false true summary", "blocks left out count: each by its means, or many by a summary key"),
};

bool Has(const Method& method, const Field& common) {
  if (common.offset == kBlockSize) return true;
  if (common.offset == kShareHeads) return !method.own_heads;
  return method.selects;
}

template <typename T>
T& At(Policy& policy, size_t offset) {
  return *reinterpret_cast<T*>(reinterpret_cast<std::byte*>(&policy) + offset);
}
template <typename T>
const T& At(const Policy& policy, size_t offset) {
  return *reinterpret_cast<const T*>(reinterpret_cast<const std::byte*>(&policy) + offset);
}

std::string Bound(double value) {
  std::ostringstream text;
  text.precision(12);
  text << value;
  return text.str();
}

// "above 0 and at most 1", "finite and at least 0"
std::string RangeOf(const Field& f) {
  const std::string least = (f.flags & FP_FIELD_ABOVE_LEAST ? "above " : "at least ") + Bound(f.least);
  if (std::isinf(f.most)) return "finite and " + least;
  return least + " and " + (f.flags & FP_FIELD_BELOW_MOST ? "below " : "at most ") + Bound(f.most);
}

void CheckFloat(const Field& f, float value) {
  if (std::isnan(value) && MayBeNotGiven(f)) return;
  const bool above = f.flags & FP_FIELD_ABOVE_LEAST ? value > f.least : value >= f.least;
  const bool below = f.flags & FP_FIELD_BELOW_MOST ? value < f.most : value <= f.most;
  if (!above || !below || std::isinf(value)) Refuse(f.name, value, RangeOf(f));
}

void CheckField(const Policy& policy, const Field& f) {
  if (IsTable(f)) return; // the method's own check knows what is in it
  if (f.type == FP_FIELD_FLOAT) return CheckFloat(f, At<float>(policy, f.offset));
  const int32_t value = At<int32_t>(policy, f.offset);
  if (value < f.least || value > f.most) {
    Refuse(f.name, value, f.type == FP_FIELD_BOOL ? "0 or 1" : "from " + Bound(f.least) + " to " + Bound(f.most));
  }
}

} // namespace

const Method* FindMethod(int32_t kind) {
  for (const Method* method : Methods()) {
    if (method->kind == kind) return method;
  }
  return nullptr;
}

const Method& MethodOf(const Policy& policy) { return *FindMethod(policy.kind); }

bool MayBeNotGiven(const Field& field) { return field.flags & (FP_FIELD_ALTERNATIVE | FP_FIELD_OPTIONAL); }

bool IsTable(const Field& field) { return field.type == FP_FIELD_INT_TABLE || field.type == FP_FIELD_FLOAT_TABLE; }

double FieldValue(const Policy& policy, const Field& field) {
  if (field.type == FP_FIELD_FLOAT) return At<float>(policy, field.offset);
  return At<int32_t>(policy, field.offset);
}

void SetField(Policy& policy, const Field& field, double value) {
  if (field.type == FP_FIELD_FLOAT) {
    At<float>(policy, field.offset) = static_cast<float>(value);
  } else {
    At<int32_t>(policy, field.offset) = static_cast<int32_t>(value);
  }
}

int32_t TableRows(const Policy& policy, const Field& field) { return At<int32_t>(policy, field.count_offset); }

const Field* FieldAt(const Method& method, int32_t index) {
  if (index < 0) return nullptr;
  if (static_cast<size_t>(index) < method.fields.size()) return &method.fields[index];
  int32_t left = index - static_cast<int32_t>(method.fields.size());
  for (const Field& field : kCommonFields) {
    if (Has(method, field) && left-- == 0) return &field;
  }
  return nullptr;
}

void InitPolicy(const Method& method, Policy& policy) {
  std::memset(static_cast<void*>(&policy), 0, method.size);
  policy.struct_size = static_cast<uint32_t>(method.size);
  policy.kind = method.kind;
  policy.block_size = method.common.block_size;
  policy.sink_blocks = method.common.sink_blocks;
  policy.window_blocks = method.common.window_blocks;
  policy.dense_tail_blocks = method.common.dense_tail_blocks;
  policy.share_heads = method.common.share_heads;
  for (const Field& field : method.fields) {
    if (!IsTable(field)) SetField(policy, field, field.initial);
  }
}

void CheckFields(const Method& method, const Policy& policy) {
  for (const Field& field : kCommonFields) {
    CheckField(policy, field);
    if (field.offset == kBlockSize && policy.block_size % 16 != 0) {
      Refuse("block_size", policy.block_size, "a multiple of 16");
    }
  }
  if (method.own_heads && policy.share_heads) {
    Refuse("share_heads", 1, "0 for this policy: each of its query heads has a list of its own");
  }
  for (const Field& field : method.fields) CheckField(policy, field);
  if (method.check) method.check(policy);
}

void CheckStride(int32_t stride, int32_t block_size) {
  if (stride < 4 || stride > kTileRows || (stride & (stride - 1)) != 0) {
    Refuse("stride", stride, "4, 8, 16, 32, 64 or 128");
  }
  if (block_size % stride != 0) {
    Refuse("stride", stride, "a divisor of block_size (" + std::to_string(block_size) + ")");
  }
}

bool KeepsEverything(const Policy& policy) {
  const Method& method = MethodOf(policy);
  return !method.selects || (method.keeps_everything && method.keeps_everything(policy));
}

int32_t FallbackOf(const Problem& p, const Geometry& g, const Policy& policy, const Sequence& s) {
  if (KeepsEverything(policy)) return FP_FALLBACK_DENSE;
  const Method& method = MethodOf(policy);
  const bool too_short = KeepsEverything(p, g, policy, s) || (method.too_short && method.too_short(p, policy, s));
  return too_short ? FP_FALLBACK_SHORT : FP_SELECTED;
}

VerticalSlashRoom VerticalSlashRoomOf(const Problem& p, const Policy& policy) {
  const Method& method = MethodOf(policy);
  if (p.device == FP_CUDA) return {}; // attention over single keys of a slash is the CPU's: they become blocks
  return method.vertical_slash_room ? method.vertical_slash_room(p, policy) : VerticalSlashRoom{};
}

KeyListRoom KeyListRoomOf(const Problem& p, const Policy& policy) {
  const Method& method = MethodOf(policy);
  return method.key_list_room ? method.key_list_room(p, policy) : KeyListRoom{};
}

float SkipOf(const Policy& policy) {
  const Method& method = MethodOf(policy);
  return method.skip ? method.skip(policy) : 0;
}

} // namespace flashprefill
